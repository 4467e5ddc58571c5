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
from squeezed.context.layers import ClusteredLayer

OFFSET_BYTES = VARIANCE_BYTES = 4  # int32 and float32, as stored

Count = TypeVar("Count", int, float, Tensor)


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of the parts of a layer with keys of `dim` numbers, of `element_bytes` each."""

    dim: int
    element_bytes: int
    key_bytes: int | None = None  # of a key with its value, where they are not plain numbers

    @classmethod
    def of(cls, layer: ClusteredLayer) -> LayerBytes:
        centre = layer.centre
        return cls(centre.shape[1], centre.element_size(), layer.rows.bytes_per_row)

    @property
    def row(self) -> int:
        """A plain key or value, or a mean of them."""
        return self.dim * self.element_bytes

    def keys(self, count: Count) -> Count:
        """So many keys, each with its value."""
        return (2 * self.row if self.key_bytes is None else self.key_bytes) * count

    def nodes(
        self, scored: Count, dropped: Count, second_order: bool, far_field: FarField
    ) -> Count:
        """Mean key, first row and, to second order, variance of what is scored; and the mean value
        of what is dropped, if it counts."""
        entry = self.row + OFFSET_BYTES + (VARIANCE_BYTES if second_order else 0)
        return scored * entry + dropped * (0 if far_field == "none" else self.row)

    def slope(self, far_field: FarField) -> int:
        """How values move with keys, of one KV head, if the far field asks it."""
        return self.dim * self.row if far_field == "second_order" else 0

    def index(self, tokens: int, nodes: Sequence[int]) -> int:
        """What one KV head holds on top of keys and values, `nodes` coarse to fine.

        Positions of all rows; means, variance and first row of all nodes, and first child above the
        leaves; the slope of values and the centre of keys.
        """
        narrow = tokens <= torch.iinfo(torch.int16).max
        held = tokens * (torch.int16 if narrow else torch.int32).itemsize
        held += (self.dim + 1) * self.row
        for depth, count in enumerate(nodes):
            held += count * (2 * self.row + VARIANCE_BYTES) + (count + 1) * OFFSET_BYTES
            held += (count + 1) * OFFSET_BYTES if depth < len(nodes) - 1 else 0
        return held
