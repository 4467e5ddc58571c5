"""`squeezed convert`: a saved context with its keys and values written in fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from squeezed.cli import options
from squeezed.cli.console import emit, index_progress, megabytes
from squeezed.cli.index import named
from squeezed.cli.inspect import written
from squeezed.config import check_rows


def convert(
    context: Annotated[Path, typer.Argument(help="A saved context.")],
    rows: Annotated[
        str, typer.Option("--rows", help="How to write keys and values: int8 or int4.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
    json: options.Json = False,
) -> None:
    """Write the keys and values of a saved context in fewer bits; no model is needed."""
    import squeezed
    from squeezed.context.storage.saving import prove_writable
    from squeezed.costs.inspection import describe_loss

    wanted, target = check_rows(rows), named(output)
    opened = squeezed.load(context)
    if wanted != opened.rows:
        opened.check_plain(f"an encoding as {wanted!r}")
    prove_writable(target)
    with index_progress() as progress:
        found = opened.encoded(wanted, lambda done, total: progress("encode", done, total))
    found.save(target)
    before, after, loss = opened.kv_bytes(), found.kv_bytes(), describe_loss(found.rows_loss)
    if json:
        emit(
            {
                "context": str(target),
                "rows": found.rows,
                "rows_loss": loss,
                "kv_bytes_before": before,
                "kv_bytes": after,
                "index_bytes": found.index_bytes(),
            }
        )
        return
    print(f"{target}: {megabytes(before)} of keys and values are now {megabytes(after)}")
    if found.rows != "plain":
        print(written(found.rows, loss))
