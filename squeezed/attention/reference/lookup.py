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
    block_scores,
    far_means,
    grouped,
    log_sizes,
    query_blocks,
    second_order,
)
from squeezed.attention.walk import scored_levels
from squeezed.context.layers import ClusteredLayer
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
    q = grouped(query, layer.kv_heads)
    blocks = query_blocks(q.shape[3], rule.query_block, q.device)
    far_logits = []
    for found in scored_levels(q, layer, rule.alpha):
        scores = block_scores(found.log_scores, rule.query_block, valid)
        threshold = rule.log_thresholds[found.depth][None, :, None, None]
        kept = found.opened = found.alive & ~(scores <= threshold)  # NaN too
        dropped = (found.alive & ~kept)[:, :, blocks].unsqueeze(2)
        standing = second_order(found.first, q, found.level, rule.far_alpha, layer.scale)
        mass = standing + log_sizes(found.level.sizes, standing)
        far_logits.append(mass.masked_fill(~dropped, NEG_INF))
    return Lookup(kept, torch.cat(far_logits, -1), *far_means(layer, q.dtype))
