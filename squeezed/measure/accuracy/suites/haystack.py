"""Haystacks and needles of RULER (arXiv 2404.06654, section 3), for any length and tokenizer."""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from squeezed.errors import SqueezedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)


@cache
def words() -> tuple[str, ...]:
    """Adjective-noun pairs are drawn from these lists of the package wonderwords."""
    try:
        from wonderwords import RandomWord
    except ImportError as error:
        raise SqueezedError(
            "ruler: expected the package wonderwords, got none; "
            "pip install 'squeezed-attention[eval]'"
        ) from error
    source = RandomWord()
    found = [
        sorted({w for w in source.filter(include_categories=[kind]) if re.fullmatch("[a-z]+", w)})
        for kind in ("adjective", "noun")
    ]
    return tuple(" ".join(part) for part in found)


def word_list(kind: str) -> list[str]:
    """All words of a kind, `adjective` or `noun`, in alphabetical order."""
    return words()[("adjective", "noun").index(kind)].split()


def draw(kind: str, rng: random.Random) -> str:
    """One key or value: `words` (adjective-noun), `numbers` (seven digits) or `uuids`."""
    if kind == "numbers":
        return str(rng.randint(1_000_000, 9_999_999))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(word_list('adjective'))}-{rng.choice(word_list('noun'))}"


def draw_distinct(kind: str, count: int, rng: random.Random) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw(kind, rng)] = None
    return list(found)


def needle(kind: str, key: str, value: str) -> str:
    return f"One of the special magic {kind} for {key} is: {value}."


def sentences(essays: str, count: int) -> list[str]:
    """The first `count` sentences, starting over when the essays end."""
    found = re.split(r"(?<=[.!?])\s+", essays[: count * 400 + 1000].strip())
    while len(found) < count:
        found = found * 2
    return found[:count]


def hide(needles: list[str], hay: list[str], rng: random.Random, joint: str = " ") -> str:
    """Needles at random depths between the pieces of hay, in random order."""
    places = sorted(rng.randint(0, len(hay)) for _ in needles)
    hidden, order = list(hay), rng.sample(needles, len(needles))
    for place, text in sorted(zip(places, order, strict=True), reverse=True):
        hidden.insert(place, text)
    return joint.join(hidden)


def longest_fit(
    build: Callable[[int], str],
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    most: int = 1 << 20,
) -> str:
    """`build(n)` for the largest `n` whose text has at most `tokens` tokens.

    Raises:
        SqueezedError: not even `build(1)` fits.
    """

    def fits(n: int) -> bool:
        return len(tokenizer(build(n), add_special_tokens=False)["input_ids"]) <= tokens

    low, high = 1, 2
    if not fits(1):
        raise SqueezedError(
            f"context-tokens: {tokens} are too few for this task; give a longer context"
        )
    while high < most and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return build(low)
