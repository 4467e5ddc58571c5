"""Observed queries + budget -> thresholds, and the weight of the second-order term.

One threshold per level holds for all layers and heads, so a head that needs more keys gets more
(arXiv 2411.09688, section 3.2). It is the quantile, weighted by cluster size, of the scores that
a probe's queries give, a question-like text after the document; a KV head's cluster counts as
wanted if any head of the group wants it. Scores go into histograms layer by layer, so memory does
not grow with depth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from squeezed.config import Preset, check_budget
from squeezed.ops.reference.lookup import (
    NEG_INF,
    block_scores,
    grouped,
    log_normaliser,
    node_logits,
    owners,
)
from squeezed.rule import SelectionRule
from squeezed.tree import ClusteredLayer, Level

LOWEST, HIGHEST, BINS = -60.0, 4.0, 6400  # nats: a bin is 0.01 wide
ALPHA_QUERIES = 24  # observed queries per layer that fit alpha; more changed nothing measurable
ALPHA_RANGE = (0.0, 4.0)


@dataclass(frozen=True)
class ObservedLayer:
    """A clustered layer and the probe's queries there: `queries [Hq, W, D]`."""

    layer: ClusteredLayer
    queries: Tensor
    scale: float


@dataclass(frozen=True)
class Calibration:
    """Thresholds of one preset for a grid of budgets.

    Attributes:
        budgets: increasing shares of the clustered keys.
        per_token: `[budgets, L]` float64 log thresholds for queries that select alone.
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
            log_thresholds=interpolate(self.budgets, grid, check_budget(budget)),
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
        per_token=fit_thresholds(layers, alpha, preset, budgets, 1),
        per_block=fit_thresholds(layers, alpha, preset, budgets, preset.query_block),
        alpha=alpha,
    )


def keep_shares(preset: Preset, budget: float, levels: int) -> list[float]:
    """Share of the keys that each level may keep, coarse to fine; the last is the budget."""
    shares = [budget]
    for _ in range(levels - 1):
        wider = 1.0 if preset.coarse_share is None else preset.coarse_share * math.sqrt(shares[0])
        shares.insert(0, min(1.0, wider))
    return shares


def fit_thresholds(
    layers: Sequence[ObservedLayer],
    alpha: Sequence[Tensor | None],
    preset: Preset,
    budgets: tuple[float, ...],
    block: int,
) -> Tensor:
    """Log thresholds `[budgets, L]` float64, level by level from the coarsest."""
    depth = max((len(seen.layer.levels) for seen in layers), default=0)
    found = torch.full((len(budgets), depth), NEG_INF, dtype=torch.float64)
    shares = [keep_shares(preset, budget, depth) for budget in budgets]
    for level in range(depth):
        histogram = torch.zeros(len(budgets), BINS, dtype=torch.float64)
        total = 0.0
        for seen, weights in zip(layers, alpha, strict=True):
            if seen.layer.levels:
                counts, weight = _score_histograms(seen, weights, block, level, found)
                histogram = histogram.to(counts.device) + counts
                total += weight
        histogram = histogram.cpu()
        for row, share in enumerate(shares):
            if share[level] < 1.0:
                found[row, level] = _upper_quantile(histogram[row], share[level] * total)
    return found


def _score_histograms(
    seen: ObservedLayer, alpha: Tensor | None, block: int, level: int, found: Tensor
) -> tuple[Tensor, int]:
    """Keys by log score at `level` of nodes whose ancestors are kept, `[budgets, BINS]`."""
    scores = _block_scores(seen, alpha, block, level)
    sizes = seen.layer.levels[level].sizes.double()[None, :, None].expand(scores[-1].shape)
    bins = ((scores[level] - LOWEST) * (BINS / (HIGHEST - LOWEST))).long().clamp(0, BINS - 1)
    budgets = len(found)
    first = torch.zeros_like(bins)  # the smallest budget that keeps all ancestors
    for above in range(level):
        falling = found[:, above].to(first.device, scores[above].dtype)
        needed = budgets - torch.searchsorted(falling.flip(0), scores[above].contiguous())
        first = torch.maximum(first, _inherit(needed, seen.layer, above, level))
    counts = torch.bincount(
        (first * BINS + bins).flatten(), sizes.flatten(), (budgets + 1) * BINS
    ).view(budgets + 1, BINS)
    keys = seen.layer.clustered * sizes.shape[1] * sizes.shape[2]
    return counts[:budgets].cumsum(0), keys


def _block_scores(seen: ObservedLayer, alpha: Tensor | None, block: int, last: int) -> list[Tensor]:
    """Log scores of the observed queries at levels `0..last`, each `[1, Hkv, N, C]`."""
    layer = seen.layer
    query = grouped(seen.queries[None], layer.keys.shape[0])
    normaliser, scores = None, []
    for depth, level in enumerate(layer.levels[: last + 1]):
        weight = None if alpha is None else alpha[depth]
        _, selecting = node_logits(query, level, weight, seen.scale)
        if normaliser is None:
            normaliser = log_normaliser(selecting, level.sizes)
        scores.append(block_scores(selecting - normaliser, block, None))
    return scores


def _inherit(of_nodes: Tensor, layer: ClusteredLayer, above: int, level: int) -> Tensor:
    """Spread a number per node of level `above` to its descendants at `level`."""
    for depth in range(above, level):
        parent = owners(layer.levels[depth].child_offsets, layer.levels[depth + 1].nodes)
        parent = parent[None, :, None, :].expand(-1, -1, of_nodes.shape[2], -1)
        of_nodes = of_nodes.gather(3, parent)
    return of_nodes


def _upper_quantile(histogram: Tensor, wanted: float) -> float:
    """Score above which `wanted` keys lie; `-inf` if there are not as many."""
    above = histogram.flip(0).cumsum(0)
    if float(above[-1]) <= wanted:
        return NEG_INF
    index = BINS - 1 - int(torch.searchsorted(above, torch.tensor(wanted, dtype=above.dtype)))
    return LOWEST + (index + 0.5) * (HIGHEST - LOWEST) / BINS


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
