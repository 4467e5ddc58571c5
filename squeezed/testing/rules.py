"""Rules that spend a budget on random layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from squeezed.attention.scores import NEG_INF, block_scores, grouped
from squeezed.attention.walk import scored_levels
from squeezed.config import FarField
from squeezed.context.layers import ClusteredLayer
from squeezed.context.rule import SelectionRule

FAR_ALPHA = 0.5
"""Weight of the second-order term in the far field."""

COARSE_SHARE = 0.4
"""Of the keys stay in the running above the leaves, where selection is of second order."""


def rule_for_shares(
    query: Tensor,
    layer: ClusteredLayer,
    shares: Sequence[float],
    far_field: FarField = "none",
    alpha: Tensor | None = None,
    block: int = 1,
) -> SelectionRule:
    """Thresholds at which these very queries open so much of every level, on average.

    Args:
        query: `[B, Hq, Q, D]`, selecting in blocks of `block`.
        shares: of the clustered keys, coarse to fine; the last is the budget. A level opens no more
            than its parents hold.
        alpha: `[L, Hq]`, weights of the second-order term in the score.
    """
    thresholds: list[float] = []
    for found in scored_levels(grouped(query, layer.kv_heads), layer, alpha):
        scores = block_scores(found.log_scores, block, None).masked_fill(~found.alive, NEG_INF)
        sizes = found.level.sizes[None, :, None].expand_as(scores)
        thresholds.append(_threshold(scores, sizes, shares[found.depth]))
        found.opened = found.alive & (scores > thresholds[-1])
    rule = SelectionRule.for_all_heads(thresholds, layer, alpha, "none", block)
    return with_far_field(rule, far_field, query)


def rule_for_budget(
    query: Tensor,
    layer: ClusteredLayer,
    budget: float,
    coarse_ratio: float,
    far_field: FarField,
) -> SelectionRule:
    """The same where every level opens `coarse_ratio` times the keys of the next finer one."""
    above = range(len(layer.levels) - 1, -1, -1)
    shares = [min(1.0, budget * coarse_ratio**finer) for finer in above]
    return rule_for_shares(query, layer, shares, far_field)


def second_order_rule(
    query: Tensor, layer: ClusteredLayer, budget: float, far_field: FarField
) -> SelectionRule:
    """The same for selection to second order, with other weights in every head."""
    depth, heads = len(layer.levels), query.shape[1]
    alpha = torch.linspace(0.2, 1.0, depth * heads, device=query.device).view(depth, heads)
    shares = [max(COARSE_SHARE, budget)] * (depth - 1) + [budget]
    return rule_for_shares(query, layer, shares, far_field, alpha)


def with_far_field(rule: SelectionRule, far_field: FarField, query: Tensor) -> SelectionRule:
    """The rule for `query [B, Hq, Q, D]` with another far field."""
    far_alpha = torch.full((query.shape[1],), FAR_ALPHA, device=query.device)
    second = far_field == "second_order"
    return replace(rule, far_field=far_field, far_alpha=far_alpha if second else None)


def _threshold(scores: Tensor, sizes: Tensor, share: float) -> float:
    """Midway between the last score that fits in the share of keys and the next one."""
    order = scores.flatten().argsort(descending=True)
    read = sizes.flatten()[order].double().cumsum(0)
    last = int((read <= share * float(read[-1])).sum())
    ranked = scores.flatten()[order]
    return float((ranked[max(last - 1, 0)] + ranked[min(last, len(ranked) - 1)]) / 2)
