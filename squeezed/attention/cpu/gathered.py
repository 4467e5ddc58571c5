"""Rows that one unit of one head reads, for products: widened where they are plain, and where they
are encoded a piece of them at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from squeezed.context.encoding import levels
from squeezed.context.layers import ClusteredLayer
from squeezed.context.rows import Codes

PIECE_ROWS = 4096
"""Encoded rows of which numbers exist at once."""


@dataclass(frozen=True)
class PlainRows:
    """Keys and values `[n, D]` float32."""

    keys: Tensor
    values: Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def logits(self, q: Tensor) -> Tensor:
        """Of queries `[rows, D]`, already scaled, `[rows, n]`."""
        return q @ self.keys.T

    def weighted(self, weights: Tensor) -> Tensor:
        """Sum of the values with weights `[rows, n]`, `[rows, D]`."""
        return weights @ self.values


@dataclass(frozen=True)
class CodedRows:
    """Rows of kept leaves as codes.

    Attributes:
        codes: of the head, without a dimension for it, in their `encoding`.
        chosen: `[n]`, which code rows; `leaf [n]`, the place of each one's leaf among the kept.
        mean_keys, mean_values: `[kept, D]` float32.
    """

    codes: Codes
    encoding: str
    chosen: Tensor
    leaf: Tensor
    mean_keys: Tensor
    mean_values: Tensor

    def __len__(self) -> int:
        return len(self.chosen)

    def logits(self, q: Tensor) -> Tensor:
        """As `PlainRows.logits`: of the leaves' mean keys, and of the differences from them."""
        found = (q @ self.mean_keys.T)[:, self.leaf]
        turned = q @ self.codes.key_turn.float()
        for own, scaled in self._pieces(self.codes.keys, self.codes.key_scales):
            found[:, own] += turned @ scaled.T
        return found

    def weighted(self, weights: Tensor) -> Tensor:
        """As `PlainRows.weighted`, the codes' part turned as a sum."""
        of_leaves = weights.new_zeros(len(weights), len(self.mean_values))
        of_leaves.index_add_(1, self.leaf, weights)
        pieces = self._pieces(self.codes.values, self.codes.value_scales)
        turned = [weights[:, own] @ scaled for own, scaled in pieces]
        total = reduce(torch.add, turned, weights.new_zeros(len(weights), self.mean_keys.shape[1]))
        return of_leaves @ self.mean_values + total @ self.codes.value_turn.float()

    def _pieces(self, codes: Tensor, scales: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Levels times their rows' scales, `[m, D]` float32."""
        for start in range(0, len(self.chosen), PIECE_ROWS):
            own = slice(start, start + PIECE_ROWS)
            chosen = self.chosen[own]
            numbers = levels(codes[chosen], self.encoding, torch.float32)
            yield own, numbers.mul_(scales[chosen, None].float())


def kept_rows(layer: ClusteredLayer, head: int, kept: Tensor) -> PlainRows | CodedRows:
    """The rows of those leaves of a head that are `kept [C]`."""
    leaves = layer.levels[-1]
    sizes = leaves.sizes[head]
    chosen = kept.repeat_interleave(sizes).nonzero()[:, 0]
    codes = layer.rows.codes
    if codes is None:
        rows = chosen + layer.pinned
        return PlainRows(*(x[head][rows].float() for x in layer.rows.plain()))
    places = kept.nonzero()[:, 0]
    leaf = torch.arange(len(places)).repeat_interleave(sizes[places])
    means = (x[head, places].float() for x in (leaves.centroids, leaves.mean_values))
    return CodedRows(codes.of_heads(head), layer.rows.encoding, chosen, leaf, *means)
