"""The weight of the second-order term of every query head, fitted on observed queries."""

from __future__ import annotations

import torch
from torch import Tensor

from squeezed.attention.scores import NEG_INF
from squeezed.config import ALPHA_RANGE
from squeezed.context.captured import ObservedLayer
from squeezed.context.layers import ClusteredLayer, Level

CHUNK_KEYS = 1 << 19
"""Keys, of one or more KV heads, whose scores are held at once while alpha is fitted."""


def fit_alpha(seen: ObservedLayer, queries: int) -> Tensor:
    """Weight of the second-order term for every level and query head, `[L, Hq]` float32.

    Weighted least squares of `log(mean over the cluster of exp(s q.(k - c)))` on
    `(s |q|)^2 v / 2`, each cluster weighted by the square root of its share of the mass.

    Args:
        queries: how many of the observed ones serve, at least.
    """
    layer, heads = seen.layer, seen.layer.kv_heads
    if not layer.levels:
        return torch.zeros(0, seen.queries.shape[0], device=seen.queries.device)
    step = max(1, seen.queries.shape[1] // queries)
    chosen = seen.scale * seen.queries[:, ::step].float().unflatten(0, (heads, -1))
    query = chosen.flatten(1, 2)  # [Hkv, G * n, D]
    first = [level.centroids.float() @ query.mT for level in layer.levels]  # [Hkv, C, G * n]
    at_once = max(1, CHUNK_KEYS // layer.clustered)
    chunks = [slice(h, h + at_once) for h in range(0, heads, at_once)]
    excess = torch.cat([_leaf_excess(query[some], layer, first[-1], some) for some in chunks])
    fitted: list[Tensor] = []
    for depth in reversed(range(len(layer.levels))):
        level = layer.levels[depth]
        if level.child_offsets is not None:
            finer = first[depth + 1] + excess, layer.levels[depth + 1].sizes
            excess = _excess_over(*finer, first[depth], level)
        fitted.insert(0, _weighted_slope(chosen, first[depth], excess, level))
    return torch.stack(fitted).clamp(*ALPHA_RANGE)


def _weighted_slope(queries: Tensor, first: Tensor, excess: Tensor, level: Level) -> Tensor:
    """Alpha of all query heads at one level, `[Hq]`, from scaled queries `[Hkv, G, n, D]`."""
    energy = 0.5 * queries.square().sum(-1).flatten(1)
    term = energy[:, None] * level.variance[..., None]
    sizes = level.sizes[..., None]
    mass = (first + excess + sizes.clamp(min=1).log()).masked_fill(sizes == 0, NEG_INF)
    weight = (mass - mass.amax(1, keepdim=True)).exp_()  # softmax is slow over this dimension
    weighted = weight.div_(weight.sum(1, keepdim=True)).sqrt_() * term
    groups = queries.shape[1:3]
    over = (weighted * excess).sum(1).unflatten(1, groups).sum(-1)
    under = (weighted * term).sum(1).unflatten(1, groups).sum(-1)
    return (over / under.clamp(min=1e-20)).flatten()


def _leaf_excess(query: Tensor, layer: ClusteredLayer, first: Tensor, heads: slice) -> Tensor:
    """`log(mean of exp(s q.(k - c)))` over each leaf of some KV heads, `[heads, C, G * n]`.

    Args:
        query: `s q` of these heads, `[heads, G * n, D]`.
        first: `s q.c` of all heads, `[Hkv, C, G * n]`.
    """
    sizes, keys = layer.levels[-1].sizes[heads], layer.keys[heads, layer.pinned :].float()
    excess = _repeated(first[heads], sizes, keys.shape[1]).baddbmm_(keys, query.mT, beta=-1)
    return _log_mean(excess.clamp_(max=80.0).exp_(), sizes, sizes)


def _excess_over(mass: Tensor, sizes: Tensor, first: Tensor, level: Level) -> Tensor:
    """The same over the nodes of a coarser level, from the finer level's mean mass."""
    assert level.child_offsets is not None
    children = level.child_offsets.diff(dim=-1)
    excess = (mass - _repeated(first, children, mass.shape[1])).clamp_(max=80.0).exp_()
    return _log_mean(excess.mul_(sizes[..., None]), children, level.sizes)


def _repeated(of_nodes: Tensor, members: Tensor, rows: int) -> Tensor:
    """Repeat every node's row for each of its members, `[Hkv, C, m]` -> `[Hkv, rows, m]`."""
    heads = len(of_nodes)
    own = torch.repeat_interleave(members.flatten(), output_size=heads * rows)
    return of_nodes.flatten(0, 1)[own].unflatten(0, (heads, rows))


def _log_mean(rows: Tensor, members: Tensor, weight: Tensor) -> Tensor:
    """Log of the sum over each node's members by the node's weight, `[Hkv, C, m]`."""
    lengths = members.flatten()
    total = torch.segment_reduce(rows.flatten(0, 1), "sum", lengths=lengths, unsafe=True)
    mean = total.view(*members.shape, -1) / weight.clamp(min=1)[..., None]
    return mean.clamp(min=1e-30).log()
