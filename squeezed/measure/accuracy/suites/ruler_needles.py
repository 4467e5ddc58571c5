"""RULER's eight needle tasks: what hides in what, and how many of each."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from squeezed.measure.accuracy.data import read_text, required
from squeezed.measure.accuracy.suites.haystack import (
    NOISE,
    draw,
    draw_distinct,
    hide,
    needle,
    sentences,
)
from squeezed.measure.accuracy.suites.needle import ASK, TASK


@dataclass(frozen=True)
class NeedleTask:
    """`hay` is `noise`, `essays` or `needles`; keys that nobody asks for distract."""

    hay: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


NEEDLE_TASKS: dict[str, NeedleTask] = {
    "niah_single_1": NeedleTask("noise"),
    "niah_single_2": NeedleTask("essays"),
    "niah_single_3": NeedleTask("essays", value="uuids"),
    "niah_multikey_1": NeedleTask("essays", keys=4),
    "niah_multikey_2": NeedleTask("needles"),
    "niah_multikey_3": NeedleTask("needles", key="uuids", value="uuids"),
    "niah_multivalue": NeedleTask("essays", values=4),
    "niah_multiquery": NeedleTask("essays", keys=4, queries=4),
}

NEW_TOKENS = {"numbers": 16, "uuids": 48}  # per value


def needle_task(name: str) -> Callable[[Path | None, random.Random, int], tuple]:
    """The maker of samples of one needle task."""
    spec = NEEDLE_TASKS[name]

    def make(data: Path | None, rng: random.Random, number: int) -> tuple:
        keys = draw_distinct(spec.key, max(spec.keys, spec.queries), rng)
        values = {key: draw_distinct(spec.value, spec.values, rng) for key in keys}
        needles = [needle(spec.value, key, value) for key in keys for value in values[key]]
        asked = keys[: spec.queries]
        answers = tuple(value for key in asked for value in values[key])
        hay, state = hay_of(spec, data, rng), rng.getstate()

        def build(size: int) -> str:
            again = random.Random()
            again.setstate(state)
            return hide(needles, hay(size), again, "\n" if spec.hay != "essays" else " ")

        return (
            TASK.format(kind=spec.value),
            build,
            question(spec, asked),
            answers,
            NEW_TOKENS[spec.value] * len(answers),
        )

    return make


def question(spec: NeedleTask, asked: list[str]) -> str:
    """Singular for one answer, plural for several values or keys."""
    names = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
    single = ASK.replace("{key}", names)
    if spec.values == 1 and len(asked) == 1:
        return single.replace("{one}", spec.value.rstrip("s"))
    plural = single.replace("{one}", spec.value).replace("What is the", "What are all the")
    return plural.replace("provided text is", "provided text are")


def hay_of(spec: NeedleTask, data: Path | None, rng: random.Random) -> Callable[[int], list[str]]:
    """Size -> pieces of hay; larger sizes begin like smaller ones."""
    if spec.hay == "noise":
        return lambda size: [" ".join(NOISE)] * size
    if spec.hay == "essays":
        text = essays(data)
        start = rng.randrange(max(1, len(text) // 2))
        return lambda size: sentences(text[start:], size)
    seed = rng.random()

    def distractors(size: int) -> list[str]:
        source = random.Random(seed)
        return [
            needle(spec.value, draw(spec.key, source), draw(spec.value, source))
            for _ in range(size)
        ]

    return distractors


def essays(data: Path | None) -> str:
    """The essays under `data`, or `data` itself if it is a file."""
    path = required(data, "a directory with PaulGrahamEssays.json or essays.txt", "ruler")
    if path.is_dir():
        plain = path / "essays.txt"
        path = plain if plain.exists() else path / "PaulGrahamEssays.json"
    return read_text(required(path, "the essays", "ruler"))
