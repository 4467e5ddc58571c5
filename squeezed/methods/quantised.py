"""Fewer bits for keys and values, read by another method: dense attention, or ours.

The tree stays what it is, so selection is that of plain rows: only what is read has lost something.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from squeezed.config import BEST
from squeezed.context.encoding import ENCODINGS, Differences, Encoding, coded, encoded
from squeezed.context.layers import ClusteredLayer
from squeezed.context.record import ContextRecord
from squeezed.context.rows import PLAIN, Rows
from squeezed.methods.base import ContextAttention
from squeezed.methods.dense import Dense
from squeezed.methods.schemes import SCHEMES, Scheme, rotated
from squeezed.methods.squeezed import Squeezed

OURS = ("differences", "rows")
"""Differences from the leaves' means: in a rotation with the best levels of normal numbers, or as
`squeezed.context.encoding` writes them, at any number of bits."""


@dataclass(frozen=True)
class LossyRows(Rows):
    """Plain numbers that stand for rows of `bits` bits a number."""

    bits: float = 16.0

    @property
    def bytes_per_row(self) -> int:
        return round(2 * self.keys.shape[2] * self.bits / 8)

    def kv_bytes(self) -> int:
        heads, tokens, _ = self.keys.shape
        return heads * tokens * self.bytes_per_row


@dataclass(frozen=True)
class Quantised:
    """Rows in a scheme at so many bits: of `schemes.SCHEMES` or `OURS`, or an encoding's name.

    Attributes:
        centred: whether keys are those relative to what they share, as this package keeps them, or
            as the model makes them.
        selects: whether `best` selects among them; otherwise attention is dense.
    """

    name = "quantised"
    paper = "https://arxiv.org/abs/2402.02750"

    scheme: str = "rotation"
    bits: int = 4
    centred: bool = True
    selects: bool = False
    implementation: str = "auto"

    def prepare(self, context: ContextRecord, budget: float) -> Sequence[ContextAttention]:
        seen: list[Tensor | None] = list(context.observed) or [None] * len(context.layers)
        layers = (
            lossy(layer, self.scheme, self.bits, self.centred, queries)
            for layer, queries in zip(context.clustered_layers, seen, strict=False)
        )
        altered = replace(
            context,
            layers=tuple(
                next(layers) if isinstance(x, ClusteredLayer) else x for x in context.layers
            ),
        )
        if self.selects:
            return Squeezed(BEST.name, self.implementation).prepare(altered, budget)
        return Dense().prepare(altered, budget)


def lossy(
    layer: ClusteredLayer, scheme: str, bits: int, centred: bool, queries: Tensor | None
) -> ClusteredLayer:
    """The layer with plain rows that have lost what the scheme loses."""
    if scheme in ENCODINGS or not layer.levels:
        return encoded(layer, scheme, queries) if layer.levels else layer
    pinned = layer.pinned
    keys, values = (x.clone() for x in layer.rows.plain())
    leaves = layer.levels[-1]
    for rows, means, asked in (
        (keys, leaves.centroids, queries),
        (values, leaves.mean_values, None),
    ):
        behind, own = rows[:, pinned:], torch.stack(list(layer.of_leaves(means))).float()
        if scheme == "rows":
            found, cost = _ours(layer, rows, means, bits, asked)
            behind.copy_(own + found)
            continue
        shift = layer.centre[:, None].float() if rows is keys and not centred else 0.0
        shift = shift - own if scheme == "differences" else shift
        cost = _written(behind, shift, layer, SCHEMES.get(scheme, rotated), bits, rows is keys)
    if scheme in OURS:  # a leaf's means are read, or lie in the index, for its rows
        cost += 8 * layer.dtype.itemsize * leaves.nodes / layer.clustered
    return replace(layer, rows=LossyRows(keys, values, PLAIN, None, cost))


def _written(
    rows: Tensor,
    shift: Tensor | float,
    layer: ClusteredLayer,
    scheme: Scheme,
    bits: int,
    keys: bool,
) -> float:
    """Let `rows [Hkv, n, D]`, in the order of the document and moved by `shift`, lose in place what
    the scheme loses; the bits of a number."""
    moved = rows.float() + shift
    cost = float(bits)
    for head, order in enumerate(layer.positions[:, layer.pinned :].long().argsort(1)):
        moved[head, order], cost = scheme(moved[head, order], bits, keys)
    rows.copy_(moved - shift)
    return cost


def _ours(
    layer: ClusteredLayer, rows: Tensor, means: Tensor, bits: int, queries: Tensor | None
) -> tuple[Tensor, float]:
    """What `squeezed.context.encoding` leaves of differences from the leaves, and bits a number."""
    top = 2**bits - 1
    encoding = Encoding(f"{bits} bits", 0, top, top / 2, torch.uint8, packed=False)
    asked = None if queries is None else queries.unflatten(0, (layer.kv_heads, -1)).flatten(1, 2)
    codes, scales, matrix = coded(Differences(layer, rows, means), encoding, asked)
    level = (codes.float() - encoding.zero) * scales.float()[..., None]
    return level @ matrix.float(), bits + 16 / layer.dim
