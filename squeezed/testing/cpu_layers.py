"""A random clustered layer for the CPU benchmark.

Keys are a coarse centre, plus a leaf's offset, plus noise: scores spread as those of real heads do.
The tree is drawn directly, no clustering needed; leaf sizes vary by a factor of about twenty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from squeezed.config import FarField
from squeezed.context.layers import ClusteredLayer, Level
from squeezed.context.rule import SelectionRule
from squeezed.testing.rules import rule_for_shares

CENTRE, OFFSET, NOISE, QUERY = 0.8, 0.5, 0.6, 1.2
"""Standard deviations per dimension. A query's scores then spread by about 1.3 nats."""
COARSE_SHARE = 0.4  # of the keys stay in the running after the first level


@dataclass(frozen=True)
class Sizes:
    """One case; `shares` are clusters per clustered token, coarse and fine."""

    kv_heads: int
    group: int
    tokens: int
    dim: int
    batch: int = 1
    suffix: int = 64
    pinned: int = 116
    shares: tuple[float, float] = (0.01, 0.05)

    def queries(self) -> Tensor:
        return QUERY * torch.randn(self.batch, self.kv_heads * self.group, 1, self.dim)


def _offsets(heads: int, nodes: int, members: int) -> Tensor:
    """`[heads, nodes + 1]` int64 from 0 to `members`."""
    weights = (torch.rand(heads, nodes) + 0.05).cumsum(-1)
    ends = (weights / weights[:, -1:] * members).round().long()
    return torch.nn.functional.pad(ends, (1, 0))


def _spread(rows: Tensor, offsets: Tensor) -> Tensor:
    """Row `i` of every head, repeated for the members of node `i`."""
    counts = offsets.diff(dim=-1)
    return torch.stack([r.repeat_interleave(n, 0) for r, n in zip(rows, counts, strict=True)])


def random_layer(sizes: Sizes, dtype: torch.dtype) -> ClusteredLayer:
    """Two levels; draws from torch's global generator."""
    heads, dim, members = sizes.kv_heads, sizes.dim, sizes.tokens - sizes.pinned
    coarse, fine = (max(1, round(share * members)) for share in sizes.shares)
    children, leaves = _offsets(heads, coarse, fine), _offsets(heads, fine, members)
    centres = _spread(CENTRE * torch.randn(heads, coarse, dim), children)
    centres += OFFSET * torch.randn(heads, fine, dim)
    keys = _spread(centres, leaves) + NOISE * torch.randn(heads, members, dim)
    keys = torch.cat([torch.randn(heads, sizes.pinned, dim), keys], 1)
    values = torch.randn(heads, sizes.tokens, dim)
    nodes = leaves.gather(1, children)
    levels = tuple(
        _level(keys, values, rows + sizes.pinned, below, dtype)
        for rows, below in ((nodes, children.int()), (leaves, None))
    )
    positions = torch.arange(sizes.tokens, dtype=torch.int32).repeat(heads, 1)
    slope, centre = torch.randn(heads, dim, dim).to(dtype), torch.zeros(heads, dim, dtype=dtype)
    keys, values = keys.to(dtype), values.to(dtype)
    scale = dim**-0.5
    return ClusteredLayer(keys, values, positions, sizes.pinned, levels, slope, centre, scale)


def _level(keys: Tensor, values: Tensor, rows: Tensor, below: Tensor | None, dtype) -> Level:
    counts = rows.diff(dim=-1)
    owner = _spread(torch.arange(counts.shape[1]).expand_as(counts), rows)
    size = counts.clamp(min=1).float().unsqueeze(-1)
    pinned = keys.shape[1] - owner.shape[1]

    def mean(x: Tensor) -> Tensor:
        index = owner.unsqueeze(-1).expand(-1, -1, x.shape[2])
        total = torch.zeros(*counts.shape, x.shape[2])
        return total.scatter_add_(1, index, x[:, pinned:]) / size

    centroids, energy = mean(keys), mean(keys.square().mean(-1, keepdim=True)).squeeze(-1)
    variance = (energy - centroids.square().mean(-1)).clamp(min=0)
    return Level(centroids.to(dtype), mean(values).to(dtype), variance, rows.int(), below)


def second_order_rule(
    query: Tensor, layer: ClusteredLayer, budget: float, far_field: FarField
) -> SelectionRule:
    """Second-order selection with thresholds at which these queries read about `budget`."""
    depth, heads = len(layer.levels), query.shape[1]
    alpha = torch.linspace(0.2, 1.0, depth * heads).view(depth, heads)
    shares = [max(COARSE_SHARE, budget)] * (depth - 1) + [budget]
    return rule_for_shares(query, layer, shares, far_field, alpha)
