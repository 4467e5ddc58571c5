"""Scores of observed queries -> thresholds that spend a budget, for all layers or for each.

A threshold is the quantile, weighted by cluster size, of the scores that a probe's queries give, a
question-like text after the document; a KV head's cluster counts as wanted if any head of the
group wants it. Scores go into histograms layer by layer, so memory does not grow with depth; blocks
of every size come from the same scores. Nothing waits for the device: thresholds stay on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from squeezed.config import Preset
from squeezed.ops.reference.lookup import (
    NEG_INF,
    block_count,
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
) -> Tensor:
    """Log thresholds `[layers, blocks, budgets, L]` float64, coarse to fine, on the layers' device.

    Args:
        layers: those of one document, so all have the same number of levels.
        budgets: increasing shares of the keys.
        blocks: numbers of queries that select together.
    """
    depth = len(layers[0].layer.levels) if layers else 0
    if depth == 0:
        return torch.zeros(len(layers), len(blocks), len(budgets), 0, dtype=torch.float64)
    if preset.per_layer:
        # The second order ranks clusters better within a layer, but under one threshold it moves
        # keys away from layers whose clusters vary little: layer 0 of a model lost two thirds of
        # its keys, and its worst outputs went wrong. So first-order scores share the budget out.
        shares = keep_shares(preset, spent_shares(layers, budgets, blocks), depth)
        each = zip(layers, alpha, shares, strict=True)
        return torch.stack([_fit_one(seen, weights, own, blocks) for seen, weights, own in each])
    shares = keep_shares(preset, torch.tensor(budgets, dtype=torch.float64), depth)
    return _fit_together(layers, alpha, shares, blocks).expand(len(layers), -1, -1, -1)


def _fit_one(
    seen: ObservedLayer, alpha: Tensor | None, shares: Tensor, blocks: tuple[int, ...]
) -> Tensor:
    """Log thresholds of one layer alone, `[blocks, budgets, L]`, like the shares that it keeps."""
    found: list[Tensor] = []
    for counts in _histograms(seen, alpha, blocks, shares.shape[1], 0, found):
        found.append(_upper_quantiles(counts, shares[..., len(found)]))
    return torch.stack(found, -1)


def _fit_together(
    layers: Sequence[ObservedLayer],
    alpha: Sequence[Tensor | None],
    shares: Tensor,
    blocks: tuple[int, ...],
) -> Tensor:
    """Log thresholds for all layers, `[blocks, budgets, L]`: a pass over them per pruned level.

    Args:
        shares: `[budgets, L]` on the CPU.
    """
    budgets, depth = shares.shape
    unpruned = int((shares >= 1.0).all(0).sum())  # coarse levels, as a finer one keeps less
    shares = shares.to(layers[0].queries.device)
    found: list[Tensor] = []
    for level in range(unpruned, depth):
        counts = sum(
            next(_histograms(seen, weights, blocks, budgets, unpruned, found))
            for seen, weights in zip(layers, alpha, strict=True)
        )
        found.append(_upper_quantiles(counts, shares[:, level]))
    everything = shares.new_full((len(blocks), budgets), NEG_INF)
    return torch.stack([everything] * unpruned + found, -1)


def spent_shares(
    layers: Sequence[ObservedLayer], budgets: tuple[float, ...], blocks: tuple[int, ...]
) -> Tensor:
    """Share of its keys that each layer spends under one threshold, `[layers, blocks, budgets]`.

    Scores are of first order, and nothing is pruned above the leaves.
    """
    shares = torch.tensor(budgets, dtype=torch.float64, device=layers[0].queries.device)
    unpruned = len(layers[0].layer.levels) - 1
    counts = [next(_histograms(seen, None, blocks, 1, unpruned, [])) for seen in layers]
    thresholds = _upper_quantiles(sum(counts), shares)
    above = torch.stack(counts)[:, :, 0].flip(-1).cumsum(-1)
    place = BINS - 1 - bins_of(thresholds)
    return above.gather(-1, place.expand(len(layers), -1, -1)) / above[..., -1:]


def bins_of(scores: Tensor) -> Tensor:
    """Histogram bin of every log score, int64."""
    places = (scores.clamp(LOWEST, HIGHEST) - LOWEST) * (BINS / (HIGHEST - LOWEST))
    return places.long().clamp(max=BINS - 1)


def _histograms(
    seen: ObservedLayer,
    alpha: Tensor | None,
    blocks: tuple[int, ...],
    budgets: int,
    unpruned: int,
    found: list[Tensor],
) -> Iterator[Tensor]:
    """Keys by log score of one level after the other, `[blocks, budgets + 1, BINS]`.

    A budget's row holds the nodes whose ancestors it keeps; the last row holds all. `found` are the
    thresholds `[blocks, budgets]` of the levels known so far, from level `unpruned` on. The first
    histograms are those of the next level; append its thresholds before you ask for another.
    """
    layer, known = seen.layer, unpruned + len(found)
    kind = _block_kinds(seen.queries, blocks)
    base = kind[:, None, None] * (budgets + 1)
    row = base  # where a node counts: that of the smallest budget that keeps all its ancestors
    for depth, logits in enumerate(_log_scores(seen, alpha)):
        if depth < unpruned:
            continue
        level = layer.levels[depth]
        each = [block_scores(logits, block, None)[0].transpose(0, 1) for block in blocks]
        scores = torch.cat(each)  # [N, Hkv, C], blocks of every size
        if depth >= known:
            place = (row * BINS + bins_of(scores)).flatten()
            sizes = level.sizes.double().expand_as(scores).flatten()
            counts = sizes.new_zeros(len(blocks) * (budgets + 1) * BINS)
            counts.scatter_add_(0, place, sizes)
            yield counts.view(len(blocks), budgets + 1, BINS).cumsum(1)
        if level.child_offsets is not None:
            rising = found[depth - unpruned].to(scores.dtype).flip(-1)[kind]
            passed = torch.searchsorted(rising, scores.flatten(1)).view_as(scores)
            parent = owners(level.child_offsets, layer.levels[depth + 1].nodes)
            row = torch.maximum(row, base + budgets - passed)
            row = row.gather(2, parent.expand(len(row), -1, -1))


def _block_kinds(queries: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """Which of the block sizes each block has, `[N]` int64."""
    counts = [block_count(queries.shape[1], block) for block in blocks]
    kinds = [queries.new_full((n,), i, dtype=torch.int64) for i, n in enumerate(counts)]
    return torch.cat(kinds)


def _log_scores(seen: ObservedLayer, alpha: Tensor | None) -> Iterator[Tensor]:
    """Log scores of the observed queries at one level after the other, `[1, Hkv, G, W, C]`."""
    query = grouped(seen.queries[None], seen.layer.keys.shape[0])
    normaliser = None
    for depth, level in enumerate(seen.layer.levels):
        weight = None if alpha is None else alpha[depth]
        _, selecting = node_logits(query, level, weight, seen.scale)
        if normaliser is None:
            normaliser = log_normaliser(selecting, level.sizes)
        yield selecting - normaliser


def _upper_quantiles(counts: Tensor, shares: Tensor) -> Tensor:
    """Score above which a share of all keys lies, `[blocks, budgets]`; `-inf` if fewer are left.

    Args:
        counts: as `_histograms` gives them.
        shares: `[budgets]` or `[blocks, budgets]`.
    """
    wanted = shares * counts[:, -1].sum(-1, keepdim=True)
    above = counts[:, :-1].flip(-1).cumsum(-1).expand(*wanted.shape, -1)
    place = torch.searchsorted(above.contiguous(), wanted[..., None])[..., 0]
    scores = LOWEST + ((BINS - 1 - place).double() + 0.5) * (HIGHEST - LOWEST) / BINS
    return scores.masked_fill(above[..., -1] <= wanted, NEG_INF)
