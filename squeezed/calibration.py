"""Observed queries + budget -> thresholds, and the weight of the second-order term.

In the paper one threshold per level holds for all layers and heads, so a head that needs more keys
gets more (arXiv 2411.09688, section 3.2). A preset may give every layer its own thresholds instead
(`squeezed.thresholds`); a layer's heads always share them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from squeezed.config import Preset, check_budget
from squeezed.ops.reference.lookup import NEG_INF
from squeezed.rule import SelectionRule
from squeezed.thresholds import ObservedLayer, fit_layer_thresholds, fit_thresholds
from squeezed.tree import ClusteredLayer, Level

ALPHA_QUERIES = 24  # observed queries per layer that fit alpha; more changed nothing measurable
ALPHA_RANGE = (0.0, 4.0)


@dataclass(frozen=True)
class Calibration:
    """Thresholds of one preset for a grid of budgets.

    Attributes:
        budgets: increasing shares of the clustered keys.
        per_token: `[layers, budgets, L]` float64 log thresholds, for queries that select alone.
        per_block: the same for blocks of `preset.query_block` queries.
        alpha: per full-attention layer `[L, Hq]` float32, or `None` to first order.
    """

    preset: Preset
    budgets: tuple[float, ...]
    per_token: Tensor
    per_block: Tensor
    alpha: tuple[Tensor | None, ...]

    def rule(self, index: int, budget: float, block: bool) -> SelectionRule:
        """Rule of the `index`-th full-attention layer at `budget`, for a block or for one token."""
        grid = self.per_block if block else self.per_token
        return SelectionRule(
            log_thresholds=interpolate(self.budgets, grid[index], check_budget(budget)),
            alpha=self.alpha[index],
            far_field=self.preset.far_field,
            query_block=self.preset.query_block if block else 1,
        )


def interpolate(budgets: Sequence[float], grid: Tensor, budget: float) -> tuple[float, ...]:
    """Log thresholds at `budget`, linear in its logarithm; 1.0 keeps every node.

    Outside the grid the nearest interval is extended.
    """
    if budget >= 1.0:
        return (NEG_INF,) * grid.shape[1]
    if len(budgets) == 1:
        return tuple(grid[0].tolist())
    upper = min(max(1, sum(b < budget for b in budgets)), len(budgets) - 1)
    low, high = math.log(budgets[upper - 1]), math.log(budgets[upper])
    weight = (math.log(budget) - low) / (high - low)
    mixed = []
    for left, right in zip(grid[upper - 1].tolist(), grid[upper].tolist(), strict=True):
        mixed.append(right if NEG_INF in (left, right) else left + weight * (right - left))
    return tuple(mixed)


def calibrate(
    layers: Sequence[ObservedLayer], preset: Preset, budgets: tuple[float, ...]
) -> Calibration:
    """Fit alpha of every query head, then the thresholds of every budget."""
    alpha = tuple(fit_alpha(seen) if preset.second_order else None for seen in layers)
    return Calibration(
        preset=preset,
        budgets=budgets,
        per_token=_fit(layers, alpha, preset, budgets, 1),
        per_block=_fit(layers, alpha, preset, budgets, preset.query_block),
        alpha=alpha,
    )


def _fit(
    layers: Sequence[ObservedLayer],
    alpha: Sequence[Tensor | None],
    preset: Preset,
    budgets: tuple[float, ...],
    block: int,
) -> Tensor:
    """Thresholds `[layers, budgets, L]`: a layer's own, or the same for all."""
    if preset.per_layer:
        return fit_layer_thresholds(layers, alpha, preset, budgets, block)
    common = fit_thresholds(layers, alpha, preset, budgets, block)
    return common.expand(len(layers), *common.shape)


def fit_alpha(seen: ObservedLayer) -> Tensor:
    """Weight of the second-order term for every level and query head, `[L, Hq]` float32.

    Weighted least squares of `log(mean over the cluster of exp(s q.(k - c)))` on
    `(s |q|)^2 v / 2`, each cluster weighted by the square root of its share of the mass.
    """
    layer, scale = seen.layer, seen.scale
    step = max(1, seen.queries.shape[1] // ALPHA_QUERIES)
    queries = seen.queries[:, ::step].float().unflatten(0, (layer.keys.shape[0], -1))
    if not layer.levels:
        return torch.zeros(0, seen.queries.shape[0], device=seen.queries.device)
    fitted = [_fit_level(queries, layer, level, scale) for level in layer.levels]
    return torch.stack(fitted).clamp(*ALPHA_RANGE)


def _fit_level(query: Tensor, layer: ClusteredLayer, level: Level, scale: float) -> Tensor:
    """Alpha of all query heads at one level, `[Hq]`, from `query [Hkv, G, n, D]`."""
    flat = query.flatten(1, 2)  # [Hkv, G * n, D]
    first = scale * level.centroids.float() @ flat.mT  # [Hkv, C, G * n]
    excess = torch.stack(
        [
            _excess(flat[h], layer.keys[h, layer.pinned :], first[h], level.sizes[h], scale)
            for h in range(len(flat))
        ]
    )
    term = (0.5 * scale**2) * flat.square().sum(-1)[:, None] * level.variance[..., None]
    sizes = level.sizes[..., None]
    mass = (first + excess + sizes.clamp(min=1).log()).masked_fill(sizes == 0, NEG_INF)
    weight = mass.softmax(1).sqrt()
    groups = query.shape[1:3]
    over = (weight * term * excess).sum(1).unflatten(1, groups).sum(-1)
    under = (weight * term * term).sum(1).unflatten(1, groups).sum(-1)
    return (over / under.clamp(min=1e-20)).flatten()


def _excess(queries: Tensor, keys: Tensor, first: Tensor, sizes: Tensor, scale: float) -> Tensor:
    """`log(mean of exp(s q.(k - c)))` over each cluster of one head, `[C, G * n]`."""
    own = torch.repeat_interleave(sizes, output_size=len(keys))
    spread = (scale * keys.float() @ queries.T - first[own]).clamp(max=80.0).exp()
    mean = torch.segment_reduce(spread, "sum", lengths=sizes, unsafe=True)
    return (mean / sizes.clamp(min=1)[:, None]).clamp(min=1e-30).log()
