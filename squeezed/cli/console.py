"""Progress and notes on standard error, JSON and text on standard output."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from squeezed.context.text import encodable, printable

if TYPE_CHECKING:
    from rich.progress import TaskID

PHASES = {
    "prefill": "reading",
    "cluster": "clustering",
    "calibrate": "calibrating",
    "encode": "encoding",
    "ask": "asking",
}


CONTROLS_OF_JSON = re.compile("[\x7f-\x9f]")
"""Controls that JSON may hold as they are, and a terminal acts on."""


def note(line: str) -> None:
    """One line for the person at the terminal."""
    print(printable(line), file=sys.stderr)


def emit(record: dict) -> None:
    """The result of `--json`: one object."""
    print(json_text(record, indent=1))


def json_text(record: dict, indent: int | None = None) -> str:
    """JSON that every parser takes, in characters that standard output can hold."""
    record = _finite(record)
    text = json.dumps(record, indent=indent, ensure_ascii=False, allow_nan=False)
    fits = encodable(text, sys.stdout.encoding) == text
    if not fits or CONTROLS_OF_JSON.search(text):
        return json.dumps(record, indent=indent, allow_nan=False)
    return text


def _finite(value: Any) -> Any:
    """A record with `None` for numbers that JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def quiet_libraries() -> None:
    """Keep the libraries' own bars and advice away from our one line per error."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)


@contextmanager
def index_progress() -> Iterator[Callable[[str, int, int], None]]:
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
    tasks: dict[str, TaskID] = {}

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


def is_directory(path: Path) -> bool:
    """Whether a directory lies at `path`; a name that cannot be looked up is none."""
    try:
        return path.is_dir()
    except OSError:
        return False


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"
