"""Scores of observed queries -> thresholds that spend a budget, for all KV heads or for each.

A threshold is the quantile, weighted by cluster size, of the scores that a probe's queries give, a
question-like text after the document; a KV head's cluster counts as wanted if any head of the
group wants it. Scores go into histograms layer by layer, so memory does not grow with depth; blocks
of every size come from the same scores. Nothing waits for the device: thresholds stay on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from squeezed.attention.scores import NEG_INF, block_count, block_scores, grouped
from squeezed.attention.walk import children, scored_levels
from squeezed.config import HistogramConfig, Preset
from squeezed.context.captured import ObservedLayer


def keep_shares(preset: Preset, budgets: Tensor, levels: int) -> Tensor:
    """Share of the keys that each level may keep, `[..., L]`, coarse to fine up to the budget."""
    shares = [budgets]
    for _ in range(levels - 1):
        wider = torch.ones_like(budgets)
        if preset.coarse_share is not None:
            wider = (preset.coarse_share * shares[0].sqrt()).clamp(max=1.0)
        shares.insert(0, wider)
    return torch.stack(shares, -1)


def fit_thresholds(
    layers: Sequence[ObservedLayer],
    alpha: Sequence[Tensor | None],
    preset: Preset,
    budgets: tuple[float, ...],
    blocks: tuple[int, ...],
    scores: HistogramConfig,
) -> list[Tensor]:
    """Log thresholds of every layer, the same for all heads: `[blocks, budgets, L, Hkv]` float64.

    Args:
        layers: those of one document, so all have the same number of levels.
        budgets: increasing shares of the keys.
        blocks: numbers of queries that select together.
    """
    heads = [seen.layer.kv_heads for seen in layers]
    depth = len(layers[0].layer.levels) if layers else 0
    if depth == 0:
        grid = (len(blocks), len(budgets), 0)
        return [
            seen.queries.new_zeros(*grid, n, dtype=torch.float64)
            for seen, n in zip(layers, heads, strict=True)
        ]
    shares = keep_shares(preset, torch.tensor(budgets, dtype=torch.float64), depth)
    together = _fit_together(layers, alpha, shares, blocks, scores)
    return [together.repeat(1, 1, 1, n) for n in heads]


def fit_head_thresholds(
    seen: ObservedLayer,
    alpha: Tensor | None,
    preset: Preset,
    shares: Tensor,
    blocks: tuple[int, ...],
    scores: HistogramConfig,
) -> Tensor:
    """Log thresholds of one layer's heads, `[blocks, budgets, L, Hkv]` float64.

    Args:
        shares: of its keys that every head keeps, `[budgets, Hkv]` float64.
    """
    wanted = keep_shares(preset, shares, len(seen.layer.levels))  # [budgets, Hkv, L]
    found: list[Tensor] = []
    for counts in _histograms(seen, alpha, blocks, len(shares), 0, found, scores):
        found.append(_upper_quantiles(counts, wanted[..., len(found)], scores))
    return torch.stack(found, 2)


def _fit_together(
    layers: Sequence[ObservedLayer],
    alpha: Sequence[Tensor | None],
    shares: Tensor,
    blocks: tuple[int, ...],
    scores: HistogramConfig,
) -> Tensor:
    """Log thresholds for all heads, `[blocks, budgets, L, 1]`: a pass over the layers per level.

    Args:
        shares: `[budgets, L]` on the CPU.
    """
    budgets, depth = shares.shape
    unpruned = int((shares >= 1.0).all(0).sum())  # coarse levels, as a finer one keeps less
    shares = shares.to(layers[0].queries.device)
    found: list[Tensor] = []
    for level in range(unpruned, depth):
        counts = [
            next(_histograms(seen, weights, blocks, budgets, unpruned, found, scores)).sum(
                2, keepdim=True
            )
            for seen, weights in zip(layers, alpha, strict=True)
        ]
        found.append(_upper_quantiles(sum(counts[1:], counts[0]), shares[:, level, None], scores))
    everything = shares.new_full((len(blocks), budgets, 1), NEG_INF)
    return torch.stack([everything] * unpruned + found, 2)


def bins_of(scores: Tensor, config: HistogramConfig) -> Tensor:
    """Histogram bin of every log score, int64."""
    low, high, bins = config.lowest, config.highest, config.bins
    places = (scores.clamp(low, high) - low) * (bins / (high - low))
    return places.long().clamp(max=bins - 1)


def _histograms(
    seen: ObservedLayer,
    alpha: Tensor | None,
    blocks: tuple[int, ...],
    budgets: int,
    unpruned: int,
    found: list[Tensor],
    config: HistogramConfig,
) -> Iterator[Tensor]:
    """Keys by log score of one level after the other, `[blocks, budgets + 1, Hkv, bins]`.

    A budget's row holds the nodes whose ancestors it keeps; the last row holds all. `found` are the
    thresholds `[blocks, budgets, Hkv]`, or `[blocks, budgets, 1]` for all heads, of the levels
    known so far, from level `unpruned` on. The first histograms are those of the next level; append
    its thresholds before you ask for another.
    """
    layer, known = seen.layer, unpruned + len(found)
    heads = layer.kv_heads
    head = torch.arange(heads, device=layer.device)[:, None]
    kind = _block_kinds(seen.queries, blocks)
    base = kind[:, None, None] * (budgets + 1)
    row = base  # where a node counts: that of the smallest budget that keeps all its ancestors
    query = grouped(seen.queries[None], heads)
    for walked in scored_levels(query, layer, alpha):
        depth, level = walked.depth, walked.level
        if depth < unpruned:
            continue
        logits = walked.log_scores
        each = [block_scores(logits, block, None)[0].transpose(0, 1) for block in blocks]
        scores = torch.cat(each)  # [N, Hkv, C], blocks of every size
        if depth >= known:
            place = ((row * heads + head) * config.bins + bins_of(scores, config)).flatten()
            sizes = level.sizes.double().expand_as(scores).flatten()
            counts = sizes.new_zeros(len(blocks) * (budgets + 1) * heads * config.bins)
            counts.scatter_add_(0, place, sizes)
            yield counts.view(len(blocks), budgets + 1, heads, config.bins).cumsum(1)
        if level.child_offsets is not None:
            rising = found[depth - unpruned].to(scores.dtype).flip(1)[kind].mT
            rising = rising.expand(-1, heads, -1).contiguous()  # [N, Hkv, budgets]
            passed = torch.searchsorted(rising, scores.contiguous())
            row = torch.maximum(row, base + budgets - passed)
            row = children(row.unsqueeze(2), level, layer.levels[depth + 1].nodes).squeeze(2)


def _block_kinds(queries: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """Which of the block sizes each block has, `[N]` int64."""
    counts = [block_count(queries.shape[1], block) for block in blocks]
    kinds = [queries.new_full((n,), i, dtype=torch.int64) for i, n in enumerate(counts)]
    return torch.cat(kinds)


def _upper_quantiles(counts: Tensor, shares: Tensor, config: HistogramConfig) -> Tensor:
    """Score above which a share of a head's keys lies; `-inf` if fewer are left.

    Never above the largest score: a head that spent nothing on the probe may on a question.

    Args:
        counts: as `_histograms` gives them, or their sum over heads.
        shares: `[budgets, 1]` or `[budgets, Hkv]`.

    Returns:
        `[blocks, budgets, Hkv]`, or `[blocks, budgets, 1]` from a sum over heads.
    """
    wanted = shares * counts[:, -1].sum(-1)[:, None]
    above = counts[:, :-1].flip(-1).cumsum(-1).expand(*wanted.shape, -1).contiguous()
    place = torch.searchsorted(above, wanted[..., None], right=True)[..., 0]
    low, high, bins = config.lowest, config.highest, config.bins
    scores = low + ((bins - 1 - place).double() + 0.5) * (high - low) / bins
    return scores.masked_fill(above[..., -1] <= wanted, NEG_INF)
