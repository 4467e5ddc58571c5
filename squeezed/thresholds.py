"""Scores of observed queries -> thresholds that spend a budget, for all layers or for each.

A threshold is the quantile, weighted by cluster size, of the scores that a probe's queries give, a
question-like text after the document; a KV head's cluster counts as wanted if any head of the
group wants it. Scores go into histograms layer by layer, so memory does not grow with depth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from squeezed.config import Preset
from squeezed.ops.reference.lookup import (
    NEG_INF,
    block_scores,
    grouped,
    log_normaliser,
    node_logits,
    owners,
)
from squeezed.tree import ClusteredLayer

LOWEST, HIGHEST, BINS = -60.0, 4.0, 6400  # nats: a bin is 0.01 wide


@dataclass(frozen=True)
class ObservedLayer:
    """A clustered layer and the probe's queries there: `queries [Hq, W, D]`."""

    layer: ClusteredLayer
    queries: Tensor
    scale: float


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
    """Log thresholds for all layers together, `[budgets, L]` float64, coarse to fine.

    Args:
        budgets: increasing shares of the keys.
    """
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


def fit_layer_thresholds(
    layers: Sequence[ObservedLayer],
    alpha: Sequence[Tensor | None],
    preset: Preset,
    budgets: tuple[float, ...],
    block: int,
) -> Tensor:
    """Log thresholds of every layer, `[layers, budgets, L]` float64, for its share of each budget.

    The shares are those of first-order scores under one threshold. The second order ranks clusters
    better within a layer, but under one threshold it moves keys away from layers whose clusters
    vary little: layer 0 of a model lost two thirds of its keys, and its worst outputs went wrong.
    """
    unpruned = replace(preset, coarse_share=None)
    shares = spent_shares(layers, [None] * len(layers), unpruned, budgets, block)
    return torch.stack(
        [
            fit_thresholds([seen], [weight], preset, tuple(row), block)
            for seen, weight, row in zip(layers, alpha, shares.tolist(), strict=True)
        ]
    )


def spent_shares(
    layers: Sequence[ObservedLayer],
    alpha: Sequence[Tensor | None],
    preset: Preset,
    budgets: tuple[float, ...],
    block: int,
) -> Tensor:
    """Share of its keys that each layer spends under common thresholds, `[layers, budgets]`."""
    found = fit_thresholds(layers, alpha, preset, budgets, block)
    rows = []
    for seen, weights in zip(layers, alpha, strict=True):
        if not seen.layer.levels:
            rows.append(torch.ones(len(budgets), dtype=torch.float64))
            continue
        counts, keys = _score_histograms(seen, weights, block, found.shape[1] - 1, found)
        above = counts.cpu().flip(1).cumsum(1).flip(1)
        rows.append(above.gather(1, bins_of(found[:, -1:]))[:, 0] / keys)
    return torch.stack(rows)


def bins_of(scores: Tensor) -> Tensor:
    """Histogram bin of every log score, int64."""
    places = (scores.clamp(LOWEST, HIGHEST) - LOWEST) * (BINS / (HIGHEST - LOWEST))
    return places.long().clamp(max=BINS - 1)


def _score_histograms(
    seen: ObservedLayer, alpha: Tensor | None, block: int, level: int, found: Tensor
) -> tuple[Tensor, int]:
    """Keys by log score at `level` of nodes whose ancestors are kept, `[budgets, BINS]`."""
    scores = _block_scores(seen, alpha, block, level)
    sizes = seen.layer.levels[level].sizes.double()[None, :, None].expand(scores[-1].shape)
    bins = bins_of(scores[level])
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
