"""`squeezed append`, `update` and `crop`: a saved context whose text changes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from squeezed.cli import options
from squeezed.cli.console import (
    emit,
    index_progress,
    is_directory,
    megabytes,
    note,
    quiet_libraries,
)
from squeezed.cli.document import read_document
from squeezed.cli.index import named
from squeezed.cli.options import DEFAULTS
from squeezed.context.growth import history_of, pieces_of, trees_of
from squeezed.errors import SqueezedError

if TYPE_CHECKING:
    from squeezed import FixedContext

Saved = Annotated[Path, typer.Argument(help="A saved context.")]
Text = Annotated[Path, typer.Argument(help="A text file in UTF-8 (- reads stdin).")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Directory to write; CONTEXT itself.")
]
ReadBudget = Annotated[
    float, typer.Option("--budget", "-b", help="Share of the old keys that new text reads.")
]


def append(
    context: Saved,
    text: Text,
    output: Output = None,
    model: options.Model = DEFAULTS["model"],
    budget: ReadBudget = 1.0,
    dtype: options.Dtype = DEFAULTS["dtype"],
    device: options.Device = DEFAULTS["device"],
    json: options.Json = False,
) -> None:
    """Put a text behind that of a saved context: only the new text is read."""
    _change("append", context, text, output, model, budget, dtype, device, json)


def update(
    context: Saved,
    text: Text,
    output: Output = None,
    model: options.Model = DEFAULTS["model"],
    budget: ReadBudget = 1.0,
    dtype: options.Dtype = DEFAULTS["dtype"],
    device: options.Device = DEFAULTS["device"],
    json: options.Json = False,
) -> None:
    """Give a saved context another text: what stands before the first change is kept."""
    _change("update", context, text, output, model, budget, dtype, device, json)


def crop(
    context: Saved,
    tokens: Annotated[int, typer.Option("--tokens", "-t", help="To keep; -N takes N away.")],
    output: Output = None,
    json: options.Json = False,
) -> None:
    """Keep the first tokens of a saved context: no model is needed, and nothing is read."""
    from squeezed.engine import load

    target = _proven(context, output)
    made = load(context).crop(tokens)
    made.save(target)
    _report(target, made, json)


def _change(
    step: str,
    context: Path,
    text: Path,
    output: Path | None,
    model: str,
    budget: float,
    dtype: str,
    device: str,
    json: bool,
) -> None:
    """A step of `Session` on a saved context."""
    from squeezed import Session
    from squeezed.config import check_budget

    check_budget(budget)
    target, words = _proven(context, output), read_document(text)
    quiet_libraries()
    with Session.of(model, dtype, device, note) as session:
        old = session.open(context, "context")
        with index_progress() as progress:
            made = getattr(session, step)(old, words, budget, progress)
        made.save(target)
    _report(target, made, json)


def _proven(context: Path, output: Path | None) -> Path:
    """Where the new version shall lie; refused before any work if it cannot."""
    from squeezed.context.storage.saving import prove_writable

    if not is_directory(context):
        raise SqueezedError(f"context: {context} is no saved context; make one with squeezed index")
    target = context if output is None else named(output)
    prove_writable(target)
    return target


def _report(target: Path, context: FixedContext, json: bool) -> None:
    """What the last change kept, read and cost."""
    change = history_of(context)[-1]
    record: dict[str, Any] = {
        "context": str(target),
        "change": change.kind,
        "tokens": change.tokens,
        "kept": change.kept,
        "dropped": change.dropped,
        "read": change.read,
        "clustered": change.clustered,
        "calibrated": change.calibrated,
        "centre_fits": change.centre_fits,
        "seconds": change.seconds,
        "pieces": list(pieces_of(context)),
        "trees": len(trees_of(context)),
        "kv_bytes": context.kv_bytes(),
        "index_bytes": context.index_bytes(),
    }
    if json:
        emit(record)
        return
    thresholds = "fitted anew" if change.calibrated else "kept"
    print(
        f"{target}: {change.tokens:,} tokens, {change.kept:,} of them kept; {change.read:,} read, "
        f"{change.clustered:,} clustered, thresholds {thresholds}, "
        f"{megabytes(context.index_bytes())} of index ({change.seconds:.1f} s)"
    )
