"""Query -> kept clusters, coarse to fine, and what the dropped ones still count (the far field).

Score of node `i` with mean key `c_i`, size `N_i` and key variance `v_i`, for a query `q`
(arXiv 2411.09688, section 3; the second-order term is the next term of the cumulant expansion)::

    logit_i = s q.c_i + alpha (s |q|)^2 v_i / 2
    log S_i = logit_i - log(sum over the coarsest level of N_j exp logit_j)

Dropped nodes keep a mass `N_i exp(s q.c_i)`, or `N_i exp logit_i` with an alpha of its own. A node
is kept when `log S_i`, as the mean of `S_i` over a block of queries and the largest of the
heads of a group, exceeds the threshold of the level and KV head. Only children of kept nodes are
scored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from squeezed.attention.scores import (
    NEG_INF,
    block_count,
    block_scores,
    far_means,
    grouped,
    log_normaliser,
    log_sizes,
    node_logits,
    owners,
    query_blocks,
    second_order,
)
from squeezed.context.layers import ClusteredLayer, Level
from squeezed.context.rule import SelectionRule


@dataclass(frozen=True)
class Lookup:
    """What a query block reads, and what stands for the rest. `N` blocks, `F` nodes of all levels.

    Attributes:
        kept: `[B, Hkv, N, C]` bool, leaves that are read exactly.
        far_logits: `[B, Hkv, G, Q, F]` float32, log mass of the dropped nodes, `-inf` elsewhere.
        far_values: `[Hkv, F, D]` float32, the nodes' mean values.
        far_variance: `[Hkv, F]` float32, their keys' variances.
    """

    kept: Tensor
    far_logits: Tensor
    far_values: Tensor
    far_variance: Tensor


def lookup(
    query: Tensor,
    layer: ClusteredLayer,
    rule: SelectionRule,
    valid: Tensor | None = None,
) -> Lookup:
    """Walk the tree from the coarsest level down.

    Args:
        query: `[B, Hq, Q, D]`, after rotary embedding.
        valid: `[B, Q]` bool; padded rows select nothing and move no mean.
    """
    q = grouped(query, layer.keys.shape[0])
    blocks = query_blocks(q.shape[3], rule.query_block, q.device)
    alive = normaliser = None
    far_logits = []
    for depth, level in enumerate(layer.levels):
        first = node_logits(q, level, layer.scale)
        alpha = None if rule.alpha is None else rule.alpha[depth]
        selecting = second_order(first, q, level, alpha, layer.scale)
        if normaliser is None:
            normaliser = log_normaliser(selecting, level.sizes)
            alive = torch.ones_like(first[:, :, 0, :1, :], dtype=torch.bool)
            alive = alive.expand(-1, -1, block_count(q.shape[3], rule.query_block), -1)
        scores = block_scores(selecting - normaliser, rule.query_block, valid)
        alive = alive & (level.sizes > 0)[None, :, None, :]
        kept = alive & ~(scores <= rule.log_thresholds[depth][None, :, None, None])  # NaN too
        dropped = (alive & ~kept)[:, :, blocks].unsqueeze(2)
        standing = second_order(first, q, level, rule.far_alpha, layer.scale)
        mass = standing + log_sizes(level.sizes, first)
        far_logits.append(mass.masked_fill(~dropped, NEG_INF))
        if level.child_offsets is not None:
            alive = _children(kept, level, layer.levels[depth + 1].nodes)
    return Lookup(kept, torch.cat(far_logits, -1), *far_means(layer, q.dtype))


def _children(kept: Tensor, level: Level, child_nodes: int) -> Tensor:
    """Whether the parent of every node of the next level was kept, `[B, Hkv, N, C']`."""
    parent = owners(level.child_offsets, child_nodes)
    batch, _, blocks, _ = kept.shape
    return kept.gather(3, parent[None, :, None, :].expand(batch, -1, blocks, -1))
