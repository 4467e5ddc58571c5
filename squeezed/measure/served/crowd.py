"""A crowd on a server of `squeezed serve`: is every answer that of the same request alone?

    python -m squeezed.measure.served.crowd OUT.json --model demo --minutes 4

Documents are indexed by the server, and every request is asked alone. Then come eight requests
about one document, one after the other and at once; clients that ask about several documents for
minutes, some of whom leave in the middle; a document that is indexed beside an answer; and ten
thousand requests that are tiny or wrong. Told are answers that differ or are lost, times to the
first and to each further piece, the longest pause of an answer beside indexing, and what memory
the server took.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from squeezed.errors import SqueezedError
from squeezed.measure.record import write_record
from squeezed.measure.served.load import SAMPLE_SECONDS, Tally, growth, text_of
from squeezed.measure.served.local import LocalServer, Seen
from squeezed.measure.served.tiny import tiny

QUESTIONS = ("Which words come first?", "Is there a number above 990?", "What is this about?")
BUDGETS = (0.1, 0.3, 1.0)
AT_ONCE = 8
LEAVERS = 0.1


def cases_over(names: list[str], tokens: int) -> list[dict[str, Any]]:
    """Requests about every document with every budget, and some about none."""
    found: list[dict[str, Any]] = []
    for number, question in enumerate(QUESTIONS):
        said = {"messages": [{"role": "user", "content": question}]}
        for name in names:
            for budget in BUDGETS:
                length = tokens - (7 * len(found)) % (tokens // 2)
                found.append(said | {"context": name, "budget": budget, "max_tokens": length})
        found.append(said | {"max_tokens": tokens - number})
    return found


class Crowd:
    """Clients on a server, and what they saw."""

    def __init__(self, server: LocalServer, cases: list[dict[str, Any]]) -> None:
        self.server, self.cases, self.tally = server, cases, Tally()
        self.alone = [whole(server.read(case)) for case in cases]
        self.first: list[float] = []
        self.gaps: list[float] = []
        self.memory: list[int] = []

    def run(self, clients: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        threads = [
            threading.Thread(target=self._client, args=(random.Random(n), end), daemon=True)
            for n in range(clients)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            self.memory.append(self.server.memory_bytes())
            time.sleep(SAMPLE_SECONDS)

    def _client(self, draw: random.Random, end: float) -> None:
        while time.monotonic() < end:
            place = draw.randrange(len(self.cases))
            leaves = draw.random() < LEAVERS
            try:
                seen = self.server.read(self.cases[place], draw.randrange(1, 6) if leaves else None)
            except OSError as error:  # a failure is a result
                self.tally.count("lost", {"error": f"{type(error).__name__}: {error}"})
                continue
            self._judge(place, seen)

    def _judge(self, place: int, seen: Seen) -> None:
        alone, case = self.alone[place], self.cases[place]
        if seen.times:
            self.first.append(seen.times[0])
            self.gaps += seen.gaps
        if seen.ended == "left":
            differs = not alone.text.startswith(seen.text)
        else:
            differs = (seen.text, seen.ended) != (alone.text, alone.ended)
        kind = "left" if seen.ended == "left" else "answered"
        same = next((i for i, (a, b) in enumerate(zip(seen.text, alone.text, strict=False))
                     if a != b), min(len(seen.text), len(alone.text)))  # fmt: skip
        wrong = {"request": case, "first_differing_character": same, "ended": seen.ended}
        self.tally.count(kind, wrong if differs else None)


def whole(seen: Seen) -> Seen:
    """An answer that ended as it should; raises `SqueezedError` for any other."""
    if seen.ended not in ("stop", "length"):
        raise SqueezedError(f"a request alone was not answered: {seen.ended}")
    return seen


def together(server: LocalServer, asked: list[dict[str, Any]]) -> tuple[float, list[Seen]]:
    """Seconds for all requests at once, and their answers."""
    found: dict[int, Seen] = {}

    def one(place: int) -> None:
        found[place] = whole(server.read(asked[place]))

    started = time.perf_counter()
    threads = [threading.Thread(target=one, args=(n,)) for n in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started, [found[n] for n in range(len(asked))]


def speed_up(server: LocalServer, name: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Eight requests about one document, one after the other and at once, in turns."""
    asked = [
        {"context": name, "max_tokens": tokens, "budget": 0.1,
         "messages": [{"role": "user", "content": f"{QUESTIONS[n % 3]} ({n})"}]}
        for n in range(AT_ONCE)
    ]  # fmt: skip
    apart, at_once, same = [], [], True
    for _ in range(rounds):
        started = time.perf_counter()
        alone = [whole(server.read(each)) for each in asked]
        apart.append(time.perf_counter() - started)
        seconds, found = together(server, asked)
        at_once.append(seconds)
        same = same and [each.text for each in found] == [each.text for each in alone]
    ratios = [one / other for one, other in zip(apart, at_once, strict=True)]
    return {
        "requests": AT_ONCE,
        "one_after_another_s": [round(each, 3) for each in apart],
        "at_once_s": [round(each, 3) for each in at_once],
        "speed_up": round(statistics.median(ratios), 2),
        "answers_equal": same,
    }


def pause(server: LocalServer, name: str, words: int) -> dict[str, Any]:
    """The longest pause of an answer beside a document that is indexed, and without one."""
    said = [{"role": "user", "content": QUESTIONS[0]}]
    body = {"context": name, "messages": said, "max_tokens": 48}
    made: list[float] = []
    thread = threading.Thread(target=lambda: made.append(server.make("beside", text_of(words, 99))))
    quiet = whole(server.read(body)).gaps
    busy: list[float] = []
    thread.start()
    while thread.is_alive():
        busy += whole(server.read(body)).gaps
    thread.join()
    return {"indexed_in_s": round(made[0], 2), "document_words": words,
            "quiet": spread(quiet), "beside": spread(busy)}  # fmt: skip


def spread(seconds: list[float]) -> dict[str, float]:
    """Percentiles, in milliseconds."""
    if len(seconds) < 2:
        raise SqueezedError("too few pieces to tell of times; ask for longer answers")
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    found = {"median": cuts[49], "p90": cuts[89], "p99": cuts[98], "longest": max(seconds)}
    return {name: round(1e3 * value, 1) for name, value in found.items()} | {"count": len(seconds)}


def main(
    out: Annotated[Path, typer.Argument(help="JSON to write.")],
    model: Annotated[str, typer.Option("--model", help="As squeezed serve takes it.")],
    minutes: Annotated[float, typer.Option("--minutes", max=10)] = 4.0,
    clients: Annotated[int, typer.Option("--clients", help="At once.")] = 32,
    documents: Annotated[int, typer.Option("--documents")] = 3,
    words: Annotated[int, typer.Option("--words", help="Of a document.")] = 250,
    tokens: Annotated[int, typer.Option("--tokens", help="Of the longest answer.")] = 24,
    rounds: Annotated[int, typer.Option("--rounds", help="Of eight requests.")] = 3,
    requests: Annotated[int, typer.Option("--tiny", help="Tiny requests.")] = 10_000,
    arguments: Annotated[str, typer.Option("--arguments", help="Of squeezed serve.")] = "",
    log: Annotated[Path | None, typer.Option("--log", help="What the server writes.")] = None,
) -> None:
    """Ask a server for minutes, and compare every answer with that of the request alone."""
    settings = {name: value for name, value in locals().items() if name not in ("out", "log")}
    names = [f"document-{number}" for number in range(documents)]
    with tempfile.TemporaryDirectory() as place:
        written = log or Path(place) / "server.log"
        with LocalServer(model, Path(place) / "contexts", written, arguments.split()) as server:
            made = [server.make(name, text_of(words, seed)) for seed, name in enumerate(names)]
            typer.echo(f"indexed in {made} s", err=True)
            eight = speed_up(server, names[0], tokens, rounds)
            typer.echo(eight, err=True)
            crowd = Crowd(server, cases_over(names, tokens))
            crowd.run(clients, 60 * minutes)
            beside = pause(server, names[0], words)
            typer.echo(beside, err=True)
            many = tiny(server, requests, clients)
    row = {
        "requests_alone": len(crowd.cases),
        "done": dict(crowd.tally.done),
        "wrong": len(crowd.tally.wrong),
        "wrong_first": crowd.tally.wrong[:20],
        "first_token_ms": spread(crowd.first),
        "further_token_ms": spread(crowd.gaps),
        "memory_growth": round(growth(crowd.memory), 4),
        "memory": crowd.memory,
        "eight_on_one_document": eight,
        "pause_beside_indexing_ms": beside,
        "tiny_requests": many,
    }
    typer.echo({name: row[name] for name in row if name not in ("memory", "wrong_first")})
    write_record(out, settings | {"model": Path(model).name}, [row], "cpu")
    if crowd.tally.wrong or many["wrong"] or not eight["answers_equal"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
