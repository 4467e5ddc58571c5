"""Encoded rows as kernels take them."""

from __future__ import annotations

import torch
from torch import Tensor

from squeezed.context.encoding import ENCODINGS
from squeezed.context.rows import Codes, Rows


def code_bits(rows: Rows) -> int:
    """Bits of a code; 0 of plain rows."""
    if rows.codes is None:
        return 0
    return 4 if ENCODINGS[rows.encoding].packed else 8


def views(codes: Codes) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of keys by bytes, those of values by pairs of bytes, and both scales of a row as one
    number."""
    return codes.keys, codes.values.view(torch.int16), codes.scales.view(torch.int32)[..., 0]


def in_16_bits(rows: Rows) -> tuple[Tensor, Tensor]:
    """Keys and values that are no codes: all of plain rows, the pinned ones of encoded rows.

    Raises:
        SqueezedError: an encoding that nobody here knows.
    """
    return rows.plain() if rows.codes is None else (rows.keys, rows.values)
