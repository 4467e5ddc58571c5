"""How long a running answer waits for its next token while a document is indexed beside it.

    python -m squeezed.measure.served.pauses OUT.json --model MODEL --words 3000

Time between two pieces of a streamed answer, as its reader sees it: before, and from the request to
index until the context is saved. Once for each limit of `--pauses` (0 for none).
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from squeezed.errors import SqueezedError
from squeezed.measure.record import write_record
from squeezed.measure.served.load import gpu_bytes, text_of
from squeezed.measure.served.server import Server

QUIET_SECONDS = 5.0


class Listener(threading.Thread):
    """Reads one answer, and notes when each piece of it came."""

    def __init__(self, server: Server, ids: list[int], tokens: int) -> None:
        super().__init__(daemon=True)
        self.server, self.ids, self.tokens = server, ids, tokens
        self.times: list[float] = []
        self.over = threading.Event()

    def run(self) -> None:
        for _ in self.server.stream(self.ids, {}, self.tokens):
            self.times.append(time.perf_counter())
            if self.over.is_set():
                break

    def between(self, start: float, stop: float) -> list[float]:
        """Milliseconds between pieces, of those that end in a span of time."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return [1e3 * (later - one) for one, later in pairs if start <= later <= stop]


def spread(gaps: list[float]) -> dict[str, float]:
    """In milliseconds."""
    if len(gaps) < 20:
        raise SqueezedError(f"{len(gaps)} tokens are too few to tell of pauses; take a longer text")
    cuts = statistics.quantiles(gaps, n=100)
    found = {"median": cuts[49], "p90": cuts[89], "p99": cuts[98], "longest": max(gaps)}
    return {name: round(value, 2) for name, value in found.items()} | {"tokens": len(gaps)}


def measured(server: Server, words: int, tokens: int) -> dict[str, Any]:
    """Pauses without and with a document that is indexed."""
    first = {"name": "warm", "text": text_of(max(50, words // 20), 1)}
    status, said = server.send("POST", "/v1/contexts", first)  # kernels are compiled there
    if status != 201:
        raise SqueezedError(f"no document could be indexed: {said}")
    listener = Listener(server, [5, 6, 7, 8], tokens)
    listener.start()
    while len(listener.times) < 10:
        time.sleep(0.05)
    quiet = time.perf_counter()
    time.sleep(QUIET_SECONDS)
    started = time.perf_counter()
    status, said = server.send("POST", "/v1/contexts", {"name": "x", "text": text_of(words, 2)})
    ended = time.perf_counter()
    listener.over.set()
    if status != 201:
        raise SqueezedError(f"the document was not indexed: {said}")
    if not listener.is_alive():
        raise SqueezedError("the answer ended before the document was indexed; raise --tokens")
    return {
        "document_tokens": said["tokens"],
        "seconds": said["seconds"],
        "indexed_in_s": round(ended - started, 2),
        "quiet_ms": spread(listener.between(quiet, started)),
        "indexing_ms": spread(listener.between(started, ended)),
    }


def main(
    out: Annotated[Path, typer.Argument(help="JSON to write.")],
    model: Annotated[str, typer.Option("--model", help="As vLLM takes it.")],
    words: Annotated[int, typer.Option("--words", help="Of the document.")] = 3000,
    tokens: Annotated[int, typer.Option("--tokens", help="Of the answer beside it.")] = 20000,
    pauses: Annotated[str, typer.Option("--pauses", help="Limits in milliseconds.")] = "0,100",
    arguments: Annotated[str, typer.Option("--arguments", help="Of vLLM, further ones.")] = "",
    log: Annotated[Path | None, typer.Option("--log", help="What the server writes.")] = None,
) -> None:
    """Measure pauses of an answer for each limit, on a server of its own."""
    rows = []
    for limit in pauses.split(","):
        with tempfile.TemporaryDirectory() as place:
            contexts = Path(place) / "contexts"
            contexts.mkdir()
            given = [*arguments.split(), "--index-pause", limit]
            with Server(model, contexts, log or Path(place) / "server.log", given) as server:
                rows.append({"limit_ms": float(limit)} | measured(server, words, tokens))
        typer.echo(rows[-1])
    settings = {"model": Path(model).name, "words": words, "arguments": arguments}
    write_record(out, settings, rows, "cuda" if gpu_bytes() else "cpu")


if __name__ == "__main__":
    typer.run(main)
