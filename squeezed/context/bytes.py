"""What reading a context costs in bytes: the one count that plans, answers, meters and benches ask.

Counts may be expected ones (a plan's), measured ones, or tensors of them: this is arithmetic on the
shapes of a layer alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from squeezed.config import FarField
from squeezed.context.encoding import ENCODINGS
from squeezed.context.layers import ClusteredLayer

OFFSET_BYTES = VARIANCE_BYTES = 4  # int32 and float32, as stored

Count = TypeVar("Count", int, float, Tensor)


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of the parts of a layer with keys of `dim` numbers, of `element_bytes` each."""

    dim: int
    element_bytes: int
    key_bytes: int | None = None  # of a key with its value, where they are not plain numbers
    coded: bool = False  # whether rows are differences from the means of their leaves

    @classmethod
    def of(cls, layer: ClusteredLayer) -> LayerBytes:
        rows = layer.rows
        return cls(layer.dim, layer.dtype.itemsize, rows.bytes_per_row, rows.codes is not None)

    @classmethod
    def written(cls, dim: int, element_bytes: int, rows: str) -> LayerBytes:
        """Of keys and values that are written so (`squeezed.config.ROWS`)."""
        if rows not in ENCODINGS:
            return cls(dim, element_bytes)
        return cls(dim, element_bytes, ENCODINGS[rows].row_bytes(dim), True)

    @property
    def row(self) -> int:
        """A plain key or value, or a mean of them."""
        return self.dim * self.element_bytes

    def keys(self, count: Count) -> Count:
        """So many clustered keys, each with its value."""
        return (2 * self.row if self.key_bytes is None else self.key_bytes) * count

    def pinned(self, count: Count) -> Count:
        """So many keys that are always read, each with its value: plain in any encoding."""
        return 2 * self.row * count

    def nodes(
        self, scored: Count, dropped: Count, second_order: bool, far_field: FarField
    ) -> Count:
        """Mean key, first row and, to second order, variance of what is scored; and the mean value
        of what is dropped, if it counts."""
        entry = self.row + OFFSET_BYTES + (VARIANCE_BYTES if second_order else 0)
        return scored * entry + dropped * (0 if far_field == "none" else self.row)

    def opened(self, leaves: Count) -> Count:
        """What so many kept leaves add: their mean values, if rows are differences from them."""
        return (self.row if self.coded else 0) * leaves

    def turns(self) -> int:
        """Of one KV head, what turns queries and outputs, if rows are encoded."""
        return 2 * self.dim * self.row if self.coded else 0

    def slope(self, far_field: FarField) -> int:
        """How values move with keys, of one KV head, if the far field asks it."""
        return self.dim * self.row if far_field == "second_order" else 0

    def index(self, tokens: int, nodes: Sequence[int]) -> int:
        """What one KV head holds on top of keys and values, `nodes` coarse to fine.

        Positions of all rows; means, variance and first row of all nodes, and first child above the
        leaves; the slope of values and the centre of keys; what turns encoded rows.
        """
        narrow = tokens <= torch.iinfo(torch.int16).max
        held = tokens * (torch.int16 if narrow else torch.int32).itemsize
        held += (self.dim + 1) * self.row + (self.turns() if nodes else 0)
        for depth, count in enumerate(nodes):
            held += count * (2 * self.row + VARIANCE_BYTES) + (count + 1) * OFFSET_BYTES
            held += (count + 1) * OFFSET_BYTES if depth < len(nodes) - 1 else 0
        return held
