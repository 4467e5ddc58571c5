"""`squeezed append`: a saved context gets more text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from squeezed.cli import options
from squeezed.cli.console import emit, index_progress, is_directory, megabytes, quiet_libraries
from squeezed.cli.document import read_document
from squeezed.cli.index import named
from squeezed.cli.options import DEFAULTS
from squeezed.errors import SqueezedError

if TYPE_CHECKING:
    from squeezed import FixedContext

Saved = Annotated[Path, typer.Argument(help="A saved context.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Directory to write; CONTEXT itself.")
]


def append(
    context: Saved,
    text: Annotated[Path, typer.Argument(help="A text file in UTF-8 (- reads stdin).")],
    output: Output = None,
    model: options.Model = DEFAULTS["model"],
    budget: Annotated[
        float, typer.Option("--budget", "-b", help="Share of the old keys that new text reads.")
    ] = 1.0,
    dtype: options.Dtype = DEFAULTS["dtype"],
    device: options.Device = DEFAULTS["device"],
    json: options.Json = False,
) -> None:
    """Put a text behind that of a saved context: only the new text is read."""
    from squeezed import Session
    from squeezed.cli.console import note

    target, more = proven(context, output), read_document(text)
    quiet_libraries()
    with Session.of(model, dtype, device, note) as session, index_progress() as progress:
        opened = session.open(context, "context")
        grown = session.append(opened, more, budget, progress)
        grown.save(target)
    report(target, grown, json)


def proven(context: Path, output: Path | None) -> Path:
    """Where the new version shall lie; refused before any work if it cannot."""
    from squeezed.context.storage.saving import prove_writable

    if not is_directory(context):
        raise SqueezedError(f"context: {context} is no saved context; make one with squeezed index")
    target = context if output is None else named(output)
    prove_writable(target)
    return target


def report(target: Path, context: FixedContext, json: bool) -> None:
    """What the last change kept, read and cost."""
    change = context.history[-1]
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
        "pieces": list(context.pieces),
        "trees": len(context.trees),
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
