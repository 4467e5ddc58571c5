"""`squeezed index`: a document becomes a saved context."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from squeezed.cli import options
from squeezed.cli.console import emit, is_directory, megabytes
from squeezed.cli.document import is_stdin
from squeezed.cli.options import DEFAULTS, index_config
from squeezed.cli.session import open_session
from squeezed.errors import SqueezedError


def index(
    document: Annotated[Path, typer.Argument(help="A text file in UTF-8 (- reads stdin).")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory to write; DOCUMENT.sqz.")
    ] = None,
    model: options.Model = DEFAULTS["model"],
    levels: options.Levels = DEFAULTS["levels"],
    iterations: options.Iterations = DEFAULTS["iterations"],
    chunk: options.Chunk = DEFAULTS["chunk"],
    rows: options.RowsOption = DEFAULTS["rows"],
    keep_control_tokens: options.KeepControlTokens = False,
    dtype: options.Dtype = DEFAULTS["dtype"],
    device: options.Device = DEFAULTS["device"],
    json: options.Json = False,
) -> None:
    """Turn a document into a fixed context and save it."""
    from squeezed.context.storage.saving import prove_writable

    config = index_config(levels, iterations, chunk, rows)
    if is_directory(document):
        raise SqueezedError(f"document: {document} is a directory; name a text file")
    target = named(output or default_output(document))
    prove_writable(target)
    opened = open_session(document, model, dtype, device, None, config, keep_control_tokens)
    with opened as (_, context):
        context.save(target)
    record: dict[str, Any] = {
        "context": str(target),
        "tokens": len(context.tokens),
        "dense": context.is_dense,
        "levels": [level.nodes for level in context.clustered_layers[0].levels],
        "kv_bytes": context.kv_bytes(),
        "index_bytes": context.index_bytes(),
        "seconds": context.seconds,
    }
    if json:
        emit(record)
        return
    seconds = ", ".join(f"{phase} {s:.1f} s" for phase, s in context.seconds.items())
    print(
        f"{target}: {record['tokens']:,} tokens, {megabytes(record['kv_bytes'])} of keys and "
        f"values, {megabytes(record['index_bytes'])} of index ({seconds})"
    )


def default_output(document: Path) -> Path:
    """`manual.sqz` beside `manual.txt`; none beside what a system or a shell gives a name."""
    parent = str(document.absolute().parent)
    if is_stdin(document) or parent in ("/dev", "/dev/fd") or parent.startswith("/proc"):
        what = "stdin" if is_stdin(document) else str(document)
        raise SqueezedError(f"output: name a directory with --output when the document is {what}")
    return document.with_suffix(".sqz")


def named(output: Path) -> Path:
    """`output` if it names a directory that can be made or replaced; `.` and `/` do not, and `-`
    would be read as stdin."""
    if output.name in ("", "..", "-"):
        raise SqueezedError(
            f"output: expected the name of a directory to write, got {output}; name it, as in "
            "../manual.sqz"
        )
    return output
