"""Random clustered layers and queries, right by construction and quick to draw.

Keys are a coarse centre plus a leaf's offset plus noise, so that scores spread as those of real
heads do; leaf sizes are random. The tree is laid out directly, no clustering needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from squeezed.context.layers import ClusteredLayer, Level
from squeezed.context.rows import Rows

CENTRE, OFFSET, NOISE = 0.75, 0.55, 0.6
"""Standard deviation of every dimension of coarse centres, leaf offsets and keys around a leaf."""


@dataclass(frozen=True)
class Sizes:
    """One benchmark case.

    Attributes:
        heads, kv_heads, dim: of the layer.
        tokens, pinned: of the context; `recent` tokens follow it.
        batch: requests that share the context.
        shares: clusters per clustered token, coarse to fine.
        query: norm of a query per square root of the dimension; with 3 scores spread by about
            3 nats.
    """

    heads: int
    kv_heads: int
    dim: int
    tokens: int
    batch: int = 1
    recent: int = 128
    pinned: int = 116
    shares: tuple[float, ...] = (0.01, 0.05)
    dtype: torch.dtype = torch.bfloat16
    query: float = 3.0


def random_layer(sizes: Sizes, seed: int, device: torch.device | str) -> ClusteredLayer:
    """A layer whose tree has `len(sizes.shares)` levels."""
    torch.manual_seed(seed)
    heads, members = sizes.kv_heads, sizes.tokens - sizes.pinned
    nodes = [max(1, round(share * members)) for share in sizes.shares]
    leaves = random_offsets(heads, members, nodes[-1], device=device) + sizes.pinned
    children = [
        random_offsets(heads, fine, coarse, device=device) for coarse, fine in pairwise(nodes)
    ]
    keys, values = torch.empty(
        2, heads, sizes.tokens, sizes.dim, dtype=sizes.dtype, device=device
    ).unbind()
    coarsest = rows_of_levels(leaves, children)[0]
    for head in range(heads):
        _fill_head(keys[head], values[head], (coarsest[head], leaves[head]))
    slope = torch.randn(heads, sizes.dim, sizes.dim, device=device).to(keys.dtype)
    return tree_over(keys, values, leaves, children, slope, sizes.dim**-0.5)


def random_queries(sizes: Sizes, agreement: float, device: torch.device | str) -> Tensor:
    """`[B, Hq, 1, D]`; `agreement` is the share of the variance that requests have in common."""
    own = torch.randn(sizes.batch, sizes.heads, 1, sizes.dim, device=device)
    common = torch.randn(1, sizes.heads, 1, sizes.dim, device=device)
    mixed = agreement**0.5 * common + (1 - agreement) ** 0.5 * own
    return (sizes.query * mixed).to(sizes.dtype)


def random_offsets(
    heads: int,
    members: int,
    nodes: int,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Random cuts `[heads, nodes + 1]` int32 of `[0, members)`; some ranges are empty."""
    shape = (heads, nodes - 1)
    cuts = torch.randint(0, members + 1, shape, generator=generator, device=device)
    ends = cuts.new_tensor([0, members]).expand(heads, 2)
    return torch.cat([ends[:, :1], cuts.sort(-1).values, ends[:, 1:]], -1).int()


def rows_of_levels(leaves: Tensor, children: Sequence[Tensor]) -> list[Tensor]:
    """Where every node's rows start, `[Hkv, C + 1]` per level, coarse to fine.

    Args:
        leaves: `[Hkv, C + 1]`, those of the leaves.
        children: of every level above, coarse to fine, first child of each node.
    """
    rows = [leaves]
    for below in reversed(children):
        rows.insert(0, rows[0].gather(1, below.long()))
    return rows


def tree_over(
    keys: Tensor,
    values: Tensor,
    leaves: Tensor,
    children: Sequence[Tensor],
    slope: Tensor,
    scale: float,
    positions: Tensor | None = None,
) -> ClusteredLayer:
    """A layer with a given tree, and the means and variances of its nodes.

    Args:
        keys, values: `[Hkv, P, D]`; rows before the first leaf are pinned.
        leaves, children: as for `rows_of_levels`.
        positions: `[Hkv, P]` int32; the rows' order if `None`.
    """
    levels = tuple(
        _level(keys, values, rows, below)
        for rows, below in zip(rows_of_levels(leaves, children), [*children, None], strict=True)
    )
    if positions is None:
        order = torch.arange(keys.shape[1], dtype=torch.int32, device=keys.device)
        positions = order.expand(len(keys), -1)
    pinned, centre = int(leaves[0, 0]), torch.zeros_like(keys[:, 0])
    rows = Rows(keys, values)
    return ClusteredLayer(rows, positions, pinned, levels, slope, centre, scale)


def _level(keys: Tensor, values: Tensor, rows: Tensor, below: Tensor | None) -> Level:
    heads, nodes = len(keys), rows.shape[1] - 1
    means, mean_values = keys.new_empty(2, heads, nodes, keys.shape[2]).unbind()
    variance = torch.empty(heads, nodes, device=keys.device)
    for head, offsets in enumerate(rows.long()):
        statistics = _statistics(keys[head], values[head], offsets)
        for target, found in zip((means, mean_values, variance), statistics, strict=True):
            target[head] = found
    return Level(means, mean_values, variance, rows, below)


def _statistics(keys: Tensor, values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean key, mean value and key variance of every node of one head, float32."""
    sizes, first = offsets.diff(), int(offsets[0])
    owner = torch.arange(len(sizes), device=keys.device).repeat_interleave(sizes)
    count = sizes.clamp(min=1).float()[:, None]

    def mean(rows: Tensor) -> Tensor:
        total = torch.zeros(len(sizes), rows.shape[1], device=rows.device)
        return total.index_add_(0, owner, rows) / count

    inside = keys[first:].float()
    centre = mean(inside)
    variance = mean((inside - centre[owner]).square().mean(1, keepdim=True))[:, 0]
    return centre, mean(values[first:].float()), variance


def _fill_head(keys: Tensor, values: Tensor, rows: tuple[Tensor, Tensor]) -> None:
    """Draw keys and values of one head; `rows` are those of its coarsest and finest nodes."""
    drawn = torch.randn(keys.shape, device=keys.device) * NOISE
    for offsets, spread in zip(rows, (CENTRE, OFFSET), strict=True):
        centre = torch.randn(len(offsets) - 1, keys.shape[1], device=keys.device) * spread
        drawn[int(offsets[0]) :] += centre.repeat_interleave(offsets.long().diff(), 0)
    keys.copy_(drawn)
    values.normal_()
