"""Progress and notes on standard error, JSON and text on standard output."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from squeezed.errors import SqueezedError

PHASES = {
    "prefill": "reading",
    "cluster": "clustering",
    "calibrate": "calibrating",
    "ask": "asking",
}


def note(line: str) -> None:
    """One line for the person at the terminal."""
    print(line, file=sys.stderr)


def emit(record: dict) -> None:
    """The result of `--json`: one object."""
    print(json.dumps(record, indent=1, ensure_ascii=False))


def quiet_libraries() -> None:
    """Keep the libraries' own bars and advice away from our one line per error."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)


@contextmanager
def index_progress() -> Iterator:
    """A progress callback for `squeezed.index`: one bar per phase."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    bars = Progress(*columns, console=Console(stderr=True))
    tasks: dict[str, int] = {}

    def report(phase: str, done: int, total: int) -> None:
        if phase not in tasks:
            bars.start()  # not before: a refused document shows no empty bar
            tasks[phase] = bars.add_task(PHASES.get(phase, phase), total=total)
        bars.update(tasks[phase], completed=done)

    try:
        yield report
    finally:
        if tasks:
            bars.stop()


def read_document(path: Path) -> str:
    """The text of a file, or of standard input for `-`.

    Raises:
        SqueezedError: missing, unreadable, or not UTF-8.
    """
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        cause = error.strerror or str(error)
        raise SqueezedError(
            f"document: cannot read {path} ({cause}); name a text file or a saved context"
        ) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SqueezedError(
            f"document: {path} is not UTF-8 text (byte {error.start:,}); convert it first, as in "
            "iconv -f latin1 -t utf-8"
        ) from error


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"
