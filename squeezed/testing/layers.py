"""Random clustered layers and queries on the GPU, right by construction and quick to draw.

Keys are a coarse centre plus a leaf's offset plus noise, so that scores spread as those of real
heads do; leaf sizes are random. The tree is laid out directly, no clustering needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from squeezed.context.layers import ClusteredLayer, Level

CENTRE, OFFSET, NOISE = 0.75, 0.55, 0.6
"""Standard deviation of every dimension of coarse centres, leaf offsets and keys around a leaf."""
QUERY = 3.0
"""Norm of a query per square root of the dimension: scores spread by about 3 nats."""


@dataclass(frozen=True)
class Sizes:
    """One benchmark case. `shares`: clusters per clustered token, coarse to fine."""

    heads: int
    kv_heads: int
    dim: int
    tokens: int
    batch: int = 1
    recent: int = 128
    pinned: int = 116
    shares: tuple[float, ...] = (0.01, 0.05)
    dtype: torch.dtype = torch.bfloat16


def random_offsets(heads: int, members: int, nodes: int, start: int = 0) -> Tensor:
    """Random cuts `[heads, nodes + 1]` of `[start, start + members)`; some ranges are empty."""
    cuts = torch.randint(0, members + 1, (heads, nodes - 1), device="cuda").sort(-1).values
    ends = cuts.new_tensor([0, members]).expand(heads, 2)
    return (torch.cat([ends[:, :1], cuts, ends[:, 1:]], -1) + start).int()


def synthetic_layer(sizes: Sizes, seed: int) -> ClusteredLayer:
    """A layer whose tree has `len(sizes.shares)` levels."""
    torch.manual_seed(seed)
    heads, members = sizes.kv_heads, sizes.tokens - sizes.pinned
    nodes = [max(1, round(share * members)) for share in sizes.shares]
    rows = [random_offsets(heads, members, nodes[-1], sizes.pinned)]
    children: list[Tensor | None] = [None]
    for coarse, fine in zip(nodes[-2::-1], nodes[:0:-1], strict=True):
        children.insert(0, random_offsets(heads, fine, coarse))
        rows.insert(0, rows[0].gather(1, children[0].long()))
    shape = (heads, sizes.tokens, sizes.dim)
    keys = torch.empty(shape, dtype=sizes.dtype, device="cuda")
    values = torch.empty_like(keys)
    means = [torch.empty(heads, n, sizes.dim, dtype=sizes.dtype, device="cuda") for n in nodes]
    mean_values = [torch.empty_like(m) for m in means]
    variance = [torch.empty(heads, n, device="cuda") for n in nodes]
    for head in range(heads):
        _fill_head(keys[head], values[head], [r[head] for r in rows])
        for depth, offsets in enumerate(rows):
            statistics = _statistics(keys[head], values[head], offsets[head].long())
            for target, found in zip((means, mean_values, variance), statistics, strict=True):
                target[depth][head] = found
    levels = zip(means, mean_values, variance, rows, children, strict=True)
    positions = torch.arange(sizes.tokens, dtype=torch.int32, device="cuda").expand(heads, -1)
    slope = torch.randn(heads, sizes.dim, sizes.dim, device="cuda").to(keys.dtype)
    levels = tuple(Level(*parts) for parts in levels)
    centre, scale = keys.new_zeros(heads, sizes.dim), sizes.dim**-0.5
    return ClusteredLayer(keys, values, positions, sizes.pinned, levels, slope, centre, scale)


def _fill_head(keys: Tensor, values: Tensor, rows: list[Tensor]) -> None:
    drawn = torch.randn(keys.shape, device="cuda") * NOISE
    for offsets, spread in ((rows[0], CENTRE), (rows[-1], OFFSET)):
        nodes = offsets.shape[0] - 1
        centre = torch.randn(nodes, keys.shape[1], device="cuda") * spread
        drawn[int(offsets[0]) :] += centre.repeat_interleave(offsets.long().diff(), 0)
    keys.copy_(drawn)
    values.normal_()


def _statistics(keys: Tensor, values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean key, mean value and key variance of every node of one head."""
    sizes = offsets.diff()
    owner = torch.arange(sizes.shape[0], device="cuda").repeat_interleave(sizes)
    first, count = int(offsets[0]), sizes.clamp(min=1).float()[:, None]

    def mean(rows: Tensor) -> Tensor:
        total = torch.zeros(sizes.shape[0], rows.shape[1], device="cuda")
        return total.index_add_(0, owner, rows[first:].float()) / count

    centre = mean(keys)
    square = mean(keys.float().square().mean(1, keepdim=True))[:, 0]
    variance = (square - centre.square().mean(1)).clamp(min=0)
    return centre, mean(values), variance


def synthetic_queries(sizes: Sizes, agreement: float) -> Tensor:
    """`[B, Hq, 1, D]`; `agreement` is the share of the variance that requests have in common."""
    own = torch.randn(sizes.batch, sizes.heads, 1, sizes.dim, device="cuda")
    common = torch.randn(1, sizes.heads, 1, sizes.dim, device="cuda")
    mixed = agreement**0.5 * common + (1 - agreement) ** 0.5 * own
    return (QUERY * mixed).to(sizes.dtype)
