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
from torch.nn.functional import pad

from squeezed.rule import SelectionRule
from squeezed.tree import ClusteredLayer, Level

NEG_INF = float("-inf")


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


def grouped(query: Tensor, kv_heads: int) -> Tensor:
    """`[B, Hq, Q, D]` -> float32 (or float64) `[B, Hkv, G, Q, D]`."""
    batch, heads, rows, dim = query.shape
    query = query if query.dtype == torch.float64 else query.float()
    return query.reshape(batch, kv_heads, heads // kv_heads, rows, dim)


def node_logits(query: Tensor, level: Level, scale: float) -> Tensor:
    """First-order logits `s q.c`, `[B, Hkv, G, Q, C]`; `-inf` where a node is empty."""
    first = scale * torch.einsum("bhgqd,hcd->bhgqc", query, level.centroids.to(query.dtype))
    return first.masked_fill((level.sizes == 0)[None, :, None, None, :], NEG_INF)


def second_order(
    first: Tensor, query: Tensor, level: Level, alpha: Tensor | None, scale: float
) -> Tensor:
    """First-order logits with `alpha (s |q|)^2 v / 2` on top; as they are if there is no `alpha`.

    Args:
        alpha: `[Hq]`.
    """
    if alpha is None:
        return first
    weight = alpha.view(1, first.shape[1], first.shape[2], 1, 1).to(query.dtype)
    energy = (0.5 * scale**2) * query.square().sum(-1, keepdim=True)
    return first + weight * energy * level.variance.to(query.dtype)[None, :, None, None, :]


def log_normaliser(coarsest: Tensor, sizes: Tensor) -> Tensor:
    """Log of the clusters' estimated mass from the coarsest level's logits, `[B, Hkv, G, Q, 1]`.

    The pinned keys are left out: counting them too moved the KL divergence by less than its noise,
    and cost another pass before anything could be selected.
    """
    return (coarsest + log_sizes(sizes, coarsest)).logsumexp(-1, keepdim=True)


def log_sizes(sizes: Tensor, like: Tensor) -> Tensor:
    """Log of the nodes' sizes `[Hkv, C]`, shaped for logits `[B, Hkv, G, Q, C]`; 0 if empty."""
    return sizes.clamp(min=1).to(like.dtype).log()[None, :, None, None, :]


def query_blocks(rows: int, block: int, device: torch.device) -> Tensor:
    """Block of every query row, `[Q]`. Blocks end at the last row, so left padding moves none."""
    from_end = torch.arange(rows - 1, -1, -1, device=device) // block
    return from_end[0] - from_end if rows else from_end


def block_count(rows: int, block: int) -> int:
    """How many blocks `query_blocks` numbers, without a look at the device."""
    return -(-rows // block)


def block_scores(log_scores: Tensor, block: int, valid: Tensor | None) -> Tensor:
    """Mean over each block of queries, largest over the group: `[B, Hkv, N, C]` in logarithms."""
    rows, device = log_scores.shape[3], log_scores.device
    if valid is not None:
        log_scores = log_scores.masked_fill(~valid[:, None, None, :, None], NEG_INF)
    if block == 1:
        return log_scores.amax(2)
    block = min(block, rows)
    count = block_count(rows, block)
    inside = torch.ones(1, rows, dtype=torch.bool, device=device) if valid is None else valid
    missing = count * block - rows  # the first block may be shorter
    log_scores = pad(log_scores, (0, 0, missing, 0), value=NEG_INF).unflatten(3, (count, block))
    members = pad(inside, (missing, 0)).unflatten(1, (count, block)).sum(-1).clamp(min=1)
    mean = log_scores.logsumexp(4) - members.log().to(log_scores.dtype)[:, None, None, :, None]
    return mean.amax(2)


def lookup(
    query: Tensor,
    layer: ClusteredLayer,
    rule: SelectionRule,
    scale: float,
    valid: Tensor | None = None,
) -> Lookup:
    """Walk the tree from the coarsest level down.

    Args:
        query: `[B, Hq, Q, D]`, after rotary embedding.
        scale: softmax scale `s`.
        valid: `[B, Q]` bool; padded rows select nothing and move no mean.
    """
    q = grouped(query, layer.keys.shape[0])
    blocks = query_blocks(q.shape[3], rule.query_block, q.device)
    alive = normaliser = None
    far_logits = []
    for depth, level in enumerate(layer.levels):
        first = node_logits(q, level, scale)
        alpha = None if rule.alpha is None else rule.alpha[depth]
        selecting = second_order(first, q, level, alpha, scale)
        if normaliser is None:
            normaliser = log_normaliser(selecting, level.sizes)
            alive = torch.ones_like(first[:, :, 0, :1, :], dtype=torch.bool)
            alive = alive.expand(-1, -1, block_count(q.shape[3], rule.query_block), -1)
        scores = block_scores(selecting - normaliser, rule.query_block, valid)
        alive = alive & (level.sizes > 0)[None, :, None, :]
        kept = alive & ~(scores <= rule.log_thresholds[depth][None, :, None, None])  # NaN too
        dropped = (alive & ~kept)[:, :, blocks].unsqueeze(2)
        standing = second_order(first, q, level, rule.far_alpha, scale)
        mass = standing + log_sizes(level.sizes, first)
        far_logits.append(mass.masked_fill(~dropped, NEG_INF))
        if level.child_offsets is not None:
            alive = _children(kept, level, layer.levels[depth + 1].nodes)
    return Lookup(kept, torch.cat(far_logits, -1), *far_means(layer, q.dtype))


def far_means(layer: ClusteredLayer, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean values `[Hkv, F, D]` and variances `[Hkv, F]` of the nodes of all levels."""
    values = torch.cat([level.mean_values for level in layer.levels], 1)
    return values.to(dtype), torch.cat([level.variance for level in layer.levels], 1).to(dtype)


def _children(kept: Tensor, level: Level, child_nodes: int) -> Tensor:
    """Whether the parent of every node of the next level was kept, `[B, Hkv, N, C']`."""
    parent = owners(level.child_offsets, child_nodes)
    batch, _, blocks, _ = kept.shape
    return kept.gather(3, parent[None, :, None, :].expand(batch, -1, blocks, -1))


def owners(offsets: Tensor, members: int) -> Tensor:
    """Index of the node that holds each member, `[Hkv, members]`, from `[Hkv, C + 1]` offsets."""
    index = torch.arange(members, device=offsets.device, dtype=offsets.dtype)
    index = index.expand(offsets.shape[0], members).contiguous()
    return torch.searchsorted(offsets[:, 1:].contiguous(), index, right=True)
