"""Minutes of mixed load on a server: is every answer that of the same request alone?

    python -m squeezed.measure.served.load OUT.json --model MODEL --minutes 10

Users come and go on several contexts, more than its memory for them holds, in a pool that is too
small for all: requests join, wait, are preempted, are streamed and left in the middle, opt out, or
have no context; documents are indexed, asked and deleted meanwhile. Before, each request is asked
alone. At the end answers that differ are counted, and what memory the server took over the time.

Greedy answers of 16-bit weights may differ where two tokens are as likely as each other: for each
that differs the record has the place of the first such token.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from squeezed.context.storage.directory import load
from squeezed.errors import SqueezedError
from squeezed.measure.record import write_record
from squeezed.measure.served.server import Server

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda".split()
BUDGETS = (0.1, 0.3, 1.0)
SAMPLE_SECONDS = 2.0
COUNTERS = {
    "preemptions": "vllm:num_preemptions_total",
    "loads": "squeezed_loads_total",
    "evictions": "squeezed_evictions_total",
    "failed_loads": "squeezed_failed_loads_total",
    "requests": "squeezed_requests_total",
    "cached_tokens": "vllm:prefix_cache_hits_total",
}


@dataclass(frozen=True)
class Case:
    """A request, and whether the answer must name a context."""

    ids: tuple[int, ...]
    arguments: tuple[tuple[str, Any], ...]
    tokens: int
    context: str | None

    def ask(self, server: Server) -> list[int] | str:
        """Its tokens, or why it was not served as asked."""
        found = server.complete(self.ids, dict(self.arguments), self.tokens)
        named = (found["said"] or {}).get("context")
        if found["tokens"] is None or named != self.context:
            return str(found["said"])
        return found["tokens"]


@dataclass
class Tally:
    """What happened, by kind, and what went wrong."""

    done: Counter[str] = field(default_factory=Counter)
    wrong: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, kind: str, wrong: dict[str, Any] | None = None) -> None:
        with self.lock:
            self.done[kind] += 1
            if wrong is not None:
                self.wrong.append({"kind": kind, **wrong})


def text_of(words: int, seed: int) -> str:
    draw = random.Random(seed)
    return " ".join(f"{draw.choice(WORDS)}{draw.randrange(1000)}" for _ in range(words))


def indexed(server: Server, contexts: Path, name: str, words: int, seed: int) -> tuple[int, ...]:
    """Let the server index a document: its ids."""
    status, said = server.send("POST", "/v1/contexts", {"name": name, "text": text_of(words, seed)})
    if status != 201:
        raise SqueezedError(f"{name} was not indexed: {said}")
    return tuple(load(contexts / f"{name}.sqz").tokens.tolist())


def cases_over(
    documents: dict[str, tuple[int, ...]], tokens: int, draw: random.Random
) -> list[Case]:
    """Requests of every kind over documents; questions short enough to be read token by token."""

    def question() -> tuple[int, ...]:
        of = draw.choice(list(documents.values()))
        start = draw.randrange(len(of) - 100)
        return of[start : start + draw.randrange(5, 80)]

    found = []
    for name, ids in documents.items():
        for budget in BUDGETS:
            for preset in ("best", "paper"):
                asked = (("squeezed_budget", budget), ("squeezed_preset", preset))
                count = draw.randrange(tokens // 2, tokens)
                found.append(Case(ids + question(), asked, count, name))
        out = (("squeezed_context", "none"),)
        found.append(Case(ids + question(), out, tokens // 4, None))
        found.append(Case(question(), (), tokens, None))
    return found


class User(threading.Thread):
    """Asks one thing after the other until the end."""

    def __init__(self, load: Load, number: int) -> None:
        super().__init__(daemon=True)
        self.load, self.draw = load, random.Random(number)
        self.number, self.turn = number, 0

    def run(self) -> None:
        while time.monotonic() < self.load.end:
            self.turn += 1
            kind = self.draw.choices(("ask", "abort", "index"), (80, 15, 5))[0]
            try:
                getattr(self, kind)()
            except Exception as error:  # a failure is a result
                self.load.tally.count(kind, {"error": f"{type(error).__name__}: {error}"})

    def ask(self) -> None:
        place = self.draw.randrange(len(self.load.cases))
        case, alone = self.load.cases[place], self.load.alone[place]
        found = case.ask(self.load.server)
        kind = "context" if case.context else "opted out" if case.arguments else "plain"
        self.load.tally.count(kind, differing(case, alone, found))

    def abort(self) -> None:
        case = self.draw.choice(self.load.cases)
        stop, seen = self.draw.randrange(0, case.tokens), 0
        stream = self.load.server.stream(case.ids, dict(case.arguments), case.tokens)
        for piece in stream:
            seen += len(piece)
            if seen >= stop:
                break
        stream.close()
        self.load.tally.count("left")

    def index(self) -> None:
        """A context of its own over a known document, asked for everything, and deleted."""
        load = self.load
        name, seed = f"own-{self.number}-{self.turn}", self.draw.choice(list(load.seeds))
        ids = indexed(load.server, load.contexts, name, load.words, seed)
        whole = [
            place
            for place, case in enumerate(load.cases)
            if case.context == load.seeds[seed] and ("squeezed_budget", 1.0) in case.arguments
        ]
        place = self.draw.choice(whole)
        known = load.cases[place]
        arguments = (("squeezed_context", name), *known.arguments)
        case = Case(ids + known.ids[len(ids) :], arguments, known.tokens, name)
        found, end = case.ask(load.server), time.monotonic() + 20
        while isinstance(found, str) and time.monotonic() < end:  # the engine looks by itself
            time.sleep(0.5)
            found = case.ask(load.server)
        wrong = differing(case, load.alone[place], found)
        status, said = load.server.send("DELETE", f"/v1/contexts/{name}")
        if status != 200:
            wrong = {"error": f"not deleted: {said}"}
        load.tally.count("indexed", wrong)


def differing(case: Case, alone: list[int], found: list[int] | str) -> dict[str, Any] | None:
    """What is wrong with an answer, if anything is."""
    if found == alone:
        return None
    if isinstance(found, str):
        return {"error": found}
    same = next(i for i, pair in enumerate(zip(alone, found, strict=True)) if pair[0] != pair[1])
    return {"first_differing_token": same, "arguments": dict(case.arguments)}


class Load:
    """Users on a server for some time."""

    def __init__(
        self, server: Server, contexts: Path, documents: int, words: int, tokens: int
    ) -> None:
        self.server, self.contexts, self.words = server, contexts, words
        self.tally, self.memory, self.end = Tally(), list[tuple[float, int, int]](), 0.0
        self.seeds = {seed: f"document-{seed}" for seed in range(documents)}
        made = {
            name: indexed(server, contexts, name, words, seed) for seed, name in self.seeds.items()
        }
        self.cases = cases_over(made, tokens, random.Random(0))
        self.alone: list[list[int]] = []

    def ask_alone(self) -> None:
        """Each request by itself."""
        time.sleep(3)  # the engine looks for contexts every two seconds
        for case in self.cases:
            found = case.ask(self.server)
            if isinstance(found, str):
                raise SqueezedError(f"a request alone was not served as asked: {found}")
            self.alone.append(found)

    def run(self, users: int, seconds: float) -> dict[str, float]:
        """What the server's counters rose by."""
        before = self.server.metrics()
        started = time.monotonic()
        self.end = started + seconds
        crowd = [User(self, number) for number in range(users)]
        for user in crowd:
            user.start()
        while any(user.is_alive() for user in crowd):
            now = time.monotonic() - started
            self.memory.append((round(now, 1), self.server.memory_bytes(), gpu_bytes()))
            time.sleep(SAMPLE_SECONDS)
        after = self.server.metrics()
        return {
            name: after.get(metric, 0.0) - before.get(metric, 0.0)
            for name, metric in COUNTERS.items()
        }


def gpu_bytes() -> int:
    """Memory in use on all GPUs."""
    import torch

    if not torch.cuda.is_available():
        return 0
    pairs = [torch.cuda.mem_get_info(number) for number in range(torch.cuda.device_count())]
    return sum(total - free for free, total in pairs)


def growth(samples: list[int]) -> float:
    """Median of the last third over that of the third before, less one: 0 where nothing grows."""
    third = len(samples) // 3
    if not third:
        return 0.0
    before, last = samples[third : 2 * third], samples[2 * third :]
    usual = statistics.median(before)
    return statistics.median(last) / usual - 1 if usual else 0.0


def main(
    out: Annotated[Path, typer.Argument(help="JSON to write.")],
    model: Annotated[str, typer.Option("--model", help="As vLLM takes it.")],
    minutes: Annotated[float, typer.Option("--minutes")] = 10.0,
    users: Annotated[int, typer.Option("--users", help="At once.")] = 8,
    documents: Annotated[int, typer.Option("--documents")] = 3,
    words: Annotated[int, typer.Option("--words", help="Of a document.")] = 150,
    tokens: Annotated[int, typer.Option("--tokens", help="Of the longest answer.")] = 48,
    pool_blocks: Annotated[int, typer.Option("--pool-blocks", help="Of vLLM's own.")] = 0,
    context_memory: Annotated[float, typer.Option("--context-memory", help="GiB.")] = 0.0,
    arguments: Annotated[str, typer.Option("--arguments", help="Of vLLM, further ones.")] = "",
    log: Annotated[Path | None, typer.Option("--log", help="What the server writes.")] = None,
) -> None:
    """Ask a server for minutes, and compare every answer with that of the request alone."""
    given = arguments.split()
    if pool_blocks:
        given += ["--num-gpu-blocks-override", str(pool_blocks)]
    if context_memory:
        given += ["--context-memory", str(context_memory)]
    with tempfile.TemporaryDirectory() as place:
        contexts = Path(place) / "contexts"
        contexts.mkdir()
        written = log or Path(place) / "server.log"
        with Server(model, contexts, written, given) as server:
            load = Load(server, contexts, documents, words, tokens)
            load.ask_alone()
            typer.echo(f"{len(load.cases)} requests were asked alone", err=True)
            counters = load.run(users, 60 * minutes)
            left = sorted(path.name for path in contexts.iterdir())
        row = {
            "requests_alone": len(load.cases),
            "done": dict(load.tally.done),
            "wrong": len(load.tally.wrong),
            "wrong_first": load.tally.wrong[:20],
            "counters": counters,
            "memory_growth": round(growth([one for _, one, _ in load.memory]), 4),
            "gpu_memory_growth": round(growth([one for *_, one in load.memory]), 4),
            "memory": load.memory,
            "left_in_directory": left,
            "document_tokens": [len(case.ids) for case in load.cases[:1]],
        }
    typer.echo({name: row[name] for name in row if name not in ("memory", "wrong_first")})
    settings = {
        "model": Path(model).name,
        "minutes": minutes,
        "users": users,
        "documents": documents,
        "words": words,
        "tokens": tokens,
        "pool_blocks": pool_blocks,
        "context_memory": context_memory,
        "arguments": arguments,
    }
    write_record(out, settings, [row], "cuda" if gpu_bytes() else "cpu")
    if load.tally.wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
