"""Rules that spend a budget on random layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from squeezed.config import FarField
from squeezed.context.layers import ClusteredLayer
from squeezed.context.rule import SelectionRule

FAR_ALPHA = 0.5
"""Weight of the second-order term in the far field."""


def rule_for_budget(
    query: Tensor,
    layer: ClusteredLayer,
    budget: float,
    coarse_ratio: float,
    far_field: FarField,
) -> SelectionRule:
    """Thresholds at which these very queries read `budget` of the clustered keys on average.

    Levels above the leaves keep `coarse_ratio` times the keys of the level below.
    """
    thresholds: list[float] = []

    def choose(score: Tensor, sizes: Tensor) -> float:
        finer = len(layer.levels) - 1 - len(thresholds)
        share = min(1.0, budget * coarse_ratio**finer)
        thresholds.append(_threshold(score, sizes.expand_as(score), share))
        return thresholds[-1]

    kept_nodes(query, layer, choose)
    plain = SelectionRule.for_all_heads(thresholds, layer, None, "none")
    return with_far_field(plain, far_field, query)


def with_far_field(rule: SelectionRule, far_field: FarField, query: Tensor) -> SelectionRule:
    """The rule for `query [B, Hq, Q, D]` with another far field."""
    far_alpha = torch.full((query.shape[1],), FAR_ALPHA, device=query.device)
    second = far_field == "second_order"
    return replace(rule, far_field=far_field, far_alpha=far_alpha if second else None)


def kept_nodes(
    query: Tensor,
    layer: ClusteredLayer,
    choose: Callable[[Tensor, Tensor], Tensor | float],
) -> list[Tensor]:
    """Kept nodes of every level, `[B, Hkv, C]` bool.

    `choose(score, sizes)` gives its threshold, one for all heads or `[Hkv, 1]`.
    """
    q = query.float().reshape(query.shape[0], layer.keys.shape[0], -1, query.shape[3])
    alive = normaliser = None
    kept = []
    for level in layer.levels:
        logits = layer.scale * torch.einsum("bhgd,hcd->bhgc", q, level.centroids.float())
        sizes = level.sizes.float()[None]  # [1, Hkv, C]
        if normaliser is None:
            normaliser = (logits + sizes[:, :, None].log()).logsumexp(-1, keepdim=True)
            alive = torch.ones_like(logits[:, :, 0], dtype=torch.bool)
        score = (logits - normaliser).amax(2).masked_fill(~alive, -torch.inf)
        kept.append((score > choose(score, sizes)) & (sizes > 0))
        if level.child_offsets is not None:
            alive = _inherit(kept[-1], level.child_offsets)
    return kept


def _threshold(score: Tensor, sizes: Tensor, share: float) -> float:
    """Midway between the last score that fits in the share of keys and the next one."""
    order = score.flatten().argsort(descending=True)
    read = sizes.flatten()[order].double().cumsum(0)
    last = int((read <= share * float(sizes.double().sum())).sum())
    ranked = score.flatten()[order]
    return float((ranked[max(last - 1, 0)] + ranked[min(last, len(ranked) - 1)]) / 2)


def _inherit(kept: Tensor, child_offsets: Tensor) -> Tensor:
    """Whether the parent of every child is kept, `[B, Hkv, C']`."""
    counts = child_offsets.long().diff(dim=-1)
    heads = [kept[:, head].repeat_interleave(counts[head], 1) for head in range(len(counts))]
    return torch.stack(heads, 1)
