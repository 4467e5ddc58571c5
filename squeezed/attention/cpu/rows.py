"""Queries as rows: one unit per request and block of queries, one layout for every kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from squeezed.attention.cpu.arrays import Array
from squeezed.attention.interface import Suffix


@dataclass(frozen=True)
class QueryRows:
    """All queries of a call. `U` units, `block` query tokens each, `R = G * block` rows of a unit.

    Attributes:
        queries: `[H, U, R, D]` float32, multiplied by the softmax scale; rows are `[G, block]`.
        mask: `[U, block, S]` bool, which suffix tokens a query attends to.
        valid: `[U, block]` bool, False for padding: it selects nothing and moves no mean.
        batch: `[U]` int64, the request of every unit.
    """

    queries: Tensor
    mask: Tensor
    valid: Tensor
    batch: Tensor

    @property
    def units(self) -> int:
        return self.queries.shape[1]

    @property
    def rows(self) -> int:
        """Rows of a unit."""
        return self.queries.shape[2]

    @property
    def flat(self) -> Array:
        """Queries of all units side by side, `[H, U * R, D]`."""
        return self.queries.view(self.queries.shape[0], -1, self.queries.shape[3]).numpy()

    def slab(self, start: int, stop: int) -> QueryRows:
        """The units `[start, stop)`."""
        if start == 0 and stop == self.units:
            return self
        own = slice(start, stop)
        return QueryRows(
            self.queries[:, own].contiguous(), self.mask[own], self.valid[own], self.batch[own]
        )


def to_rows(
    query: Tensor,
    kv_heads: int,
    suffix: Suffix | None,
    valid: Tensor | None,
    block: int,
    scale: float,
) -> QueryRows:
    """Lay out `query [B, Hq, Q, D]` and its mask. Blocks end at the last row; pads the first."""
    batch, heads, rows, dim = query.shape
    block = min(block, rows)
    blocks = -(-rows // block)
    missing = blocks * block - rows
    seen = torch.ones(1, 1, rows, 0, dtype=torch.bool) if suffix is None else suffix.seen(rows)
    mask, q = seen[:, 0].expand(batch, -1, -1), query.detach().float() * scale
    valid = torch.ones(batch, rows, dtype=torch.bool) if valid is None else valid
    if missing:
        mask, q = pad(mask, (0, 0, missing, 0)), pad(q, (0, 0, missing, 0))
        valid = pad(valid, (missing, 0))
    q = q.reshape(batch, kv_heads, heads // kv_heads, blocks, block, dim)
    return QueryRows(
        queries=q.permute(1, 0, 3, 2, 4, 5).reshape(kv_heads, batch * blocks, -1, dim).contiguous(),
        mask=mask.reshape(batch * blocks, block, mask.shape[2]).contiguous(),
        valid=valid.reshape(batch * blocks, block).contiguous(),
        batch=torch.arange(batch).repeat_interleave(blocks),
    )


def from_rows(output: Tensor, query: Tensor) -> Tensor:
    """`[H, U, R, n]` as `[B, Hq, Q, n]`, the rows of `query [B, Hq, Q, D]`."""
    batch, heads, rows, _ = query.shape
    kv_heads, units, _, width = output.shape
    group, blocks = heads // kv_heads, units // batch
    out = output.view(kv_heads, batch, blocks, group, -1, width).permute(1, 0, 3, 2, 4, 5)
    out = out.reshape(batch, heads, -1, width)
    return out[:, :, out.shape[2] - rows :]
