"""How the keys and values of a context may be written."""

from __future__ import annotations

from typing import Literal, get_args

from squeezed.errors import SqueezedError, expect

RowsName = Literal["plain", "int8", "int4"]
ROWS: tuple[RowsName, ...] = get_args(RowsName)
"""`plain` is as the model made them; `squeezed.context.encoding` says what the others mean."""


def check_rows(name: str) -> RowsName:
    """`name`; raises `SqueezedError` if rows cannot be written so."""
    expect("rows", name, str, f"one of {', '.join(ROWS)}")
    for known in ROWS:
        if name == known:
            return known
    raise SqueezedError(f"rows: expected one of {', '.join(ROWS)}, got {name!r}")
