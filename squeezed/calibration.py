"""Observed queries + budget -> thresholds, and the weights of the second-order terms.

In the paper one threshold per level holds for all layers and heads, so a head that needs more keys
gets more (arXiv 2411.09688, section 3.2). A preset may instead try every KV head out at several
shares of its keys (`squeezed.trial`), share the budget out by what that costs in error
(`squeezed.allotment`) and give every head the thresholds that spend its share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice

import torch
from torch import Tensor

from squeezed.allotment import FAR_FITTED_AT, SHARES, allot
from squeezed.config import Preset, check_budget
from squeezed.ops.reference.lookup import NEG_INF
from squeezed.rule import SelectionRule
from squeezed.thresholds import ObservedLayer, fit_head_thresholds, fit_thresholds
from squeezed.together import join_in_groups
from squeezed.tree import ClusteredLayer, Level
from squeezed.trial import Trials, try_out

ALPHA_QUERIES = 24  # observed queries per layer that fit alpha; more changed nothing measurable
ALPHA_RANGE = (0.0, 4.0)
CHUNK_KEYS = 1 << 19
"""Keys, of one or more KV heads, whose scores are held at once while alpha is fitted."""


@dataclass(frozen=True)
class Calibration:
    """Thresholds of one preset for a grid of budgets.

    Attributes:
        budgets: increasing shares of the clustered keys.
        per_token: per full-attention layer `[budgets, L, Hkv]` float64 log thresholds, for queries
            that select alone.
        per_block: the same for blocks of `preset.query_block` queries.
        alpha: per full-attention layer `[L, Hq]` float32, or `None` to first order.
        far_alpha: `[Hq]` each, or `None`: the same for the mass of dropped nodes.
    """

    preset: Preset
    budgets: tuple[float, ...]
    per_token: tuple[Tensor, ...]
    per_block: tuple[Tensor, ...]
    alpha: tuple[Tensor | None, ...]
    far_alpha: tuple[Tensor | None, ...]

    def rule(self, index: int, budget: float, block: bool) -> SelectionRule:
        """Rule of the `index`-th full-attention layer at `budget`, for a block or for one token."""
        grid = self.per_block if block else self.per_token
        return SelectionRule(
            log_thresholds=interpolate(self.budgets, grid[index], check_budget(budget)),
            alpha=self.alpha[index],
            far_field=self.preset.far_field,
            query_block=self.preset.query_block if block else 1,
            far_alpha=self.far_alpha[index],
        )


def interpolate(budgets: Sequence[float], grid: Tensor, budget: float) -> Tensor:
    """Log thresholds at `budget` from a grid `[budgets, ...]`, float32; 1.0 keeps every node.

    Linear in the logarithm of the budget; outside the grid the nearest interval is extended.
    """
    if budget >= 1.0:
        return torch.full_like(grid[0], NEG_INF, dtype=torch.float32)
    if len(budgets) == 1:
        return grid[0].float()
    upper = min(max(1, sum(b < budget for b in budgets)), len(budgets) - 1)
    low, high = math.log(budgets[upper - 1]), math.log(budgets[upper])
    weight = (math.log(budget) - low) / (high - low)
    left, right = grid[upper - 1], grid[upper]
    mixed = left + weight * (right - left)
    return torch.where(left.isinf() | right.isinf(), right, mixed).float()


def calibrate(
    layers: Sequence[ObservedLayer], preset: Preset, budgets: tuple[float, ...]
) -> Calibration:
    """Fit alpha of every query head, thresholds for every budget, and the far field."""
    joined, blocks = join_in_groups(layers), (1, preset.query_block)
    alpha = [fit_alpha(seen) if preset.second_order else None for seen in joined]
    if preset.per_head and layers and layers[0].layer.levels:
        tried = zip(joined, alpha, strict=True)
        trials = [_try_shares(seen, weight, preset) for seen, weight in tried]
        far_alpha = [trial.far_alpha for trial in trials]
        shares = allot(_apart(joined, [trial.errors for trial in trials]), budgets)
        fitted = [
            fit_head_thresholds(seen, weight, preset, own, blocks)
            for seen, weight, own in zip(joined, alpha, _grouped(joined, shares), strict=True)
        ]
    else:
        far_alpha = [_far_alpha(preset, weight) for weight in alpha]
        fitted = fit_thresholds(joined, alpha, preset, budgets, blocks)
    grids = _apart(joined, fitted)
    per_token, per_block = (tuple(grid[kind] for grid in grids) for kind in range(2))
    of_layers = (tuple(_apart(joined, found)) for found in (alpha, far_alpha))
    return Calibration(preset, budgets, per_token, per_block, *of_layers)


def _apart(joined: Sequence[ObservedLayer], found: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Per layer what was found for joined layers, whose heads are the last dimension."""
    return [
        own
        for seen, heads in zip(joined, found, strict=True)
        for own in ([None] * seen.layers if heads is None else heads.chunk(seen.layers, -1))
    ]


def _grouped(joined: Sequence[ObservedLayer], shares: Sequence[Tensor]) -> list[Tensor]:
    """Shares of layers, `[budgets, Hkv]` each, as those of joined layers."""
    rest = iter(shares)
    return [torch.cat(list(islice(rest, seen.layers)), 1) for seen in joined]


def _try_shares(seen: ObservedLayer, alpha: Tensor | None, preset: Preset) -> Trials:
    """How far the heads of a layer are from dense when all of them keep the same share."""
    shares = _tried_shares(seen.queries.device).expand(-1, len(seen.layer.keys))
    thresholds = fit_head_thresholds(seen, alpha, preset, shares, (1,))[0].float()
    return try_out(seen, alpha, thresholds, preset.far_field, FAR_FITTED_AT)


@cache
def _tried_shares(device: torch.device) -> Tensor:
    """`SHARES` `[S, 1]` on a device: copied once, for each copy waits for the device."""
    return torch.tensor(SHARES, dtype=torch.float64, device=device)[:, None]


def _far_alpha(preset: Preset, alpha: Tensor | None) -> Tensor | None:
    """That of the leaves, before any trial; zero where there is no tree."""
    if preset.far_field != "second_order" or alpha is None:
        return None
    return alpha[-1] if len(alpha) else alpha.new_zeros(alpha.shape[1])


def fit_alpha(seen: ObservedLayer) -> Tensor:
    """Weight of the second-order term for every level and query head, `[L, Hq]` float32.

    Weighted least squares of `log(mean over the cluster of exp(s q.(k - c)))` on
    `(s |q|)^2 v / 2`, each cluster weighted by the square root of its share of the mass.
    """
    layer, heads = seen.layer, seen.layer.keys.shape[0]
    if not layer.levels:
        return torch.zeros(0, seen.queries.shape[0], device=seen.queries.device)
    step = max(1, seen.queries.shape[1] // ALPHA_QUERIES)
    queries = seen.scale * seen.queries[:, ::step].float().unflatten(0, (heads, -1))
    query = queries.flatten(1, 2)  # [Hkv, G * n, D]
    first = [level.centroids.float() @ query.mT for level in layer.levels]  # [Hkv, C, G * n]
    at_once = max(1, CHUNK_KEYS // layer.clustered)
    chunks = [slice(h, h + at_once) for h in range(0, heads, at_once)]
    excess = torch.cat([_leaf_excess(query[some], layer, first[-1], some) for some in chunks])
    fitted = []
    for depth in reversed(range(len(layer.levels))):
        level = layer.levels[depth]
        if level.child_offsets is not None:
            finer = first[depth + 1] + excess, layer.levels[depth + 1].sizes
            excess = _excess_over(*finer, first[depth], level)
        fitted.insert(0, _weighted_slope(queries, first[depth], excess, level))
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
    spread = _spread(first[heads], sizes, keys.shape[1]).baddbmm_(keys, query.mT, beta=-1)
    return _log_mean(spread.clamp_(max=80.0).exp_(), sizes, sizes)


def _excess_over(mass: Tensor, sizes: Tensor, first: Tensor, level: Level) -> Tensor:
    """The same over the nodes of a coarser level, from the finer level's mean mass."""
    children = level.child_offsets.diff(dim=-1)
    spread = (mass - _spread(first, children, mass.shape[1])).clamp_(max=80.0).exp_()
    return _log_mean(spread.mul_(sizes[..., None]), children, level.sizes)


def _spread(of_nodes: Tensor, members: Tensor, rows: int) -> Tensor:
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
