"""The formulas that every walk down the tree shares: scores, blocks of queries, far field."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from squeezed.context.layers import ClusteredLayer, Level

NEG_INF = float("-inf")
LOG2E = 1 / math.log(2)  # nats to powers of two


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


def far_means(layer: ClusteredLayer, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean values `[Hkv, F, D]` and variances `[Hkv, F]` of the nodes of all levels."""
    values = torch.cat([level.mean_values for level in layer.levels], 1)
    return values.to(dtype), torch.cat([level.variance for level in layer.levels], 1).to(dtype)


def owners(offsets: Tensor, members: int) -> Tensor:
    """Index of the node that holds each member, `[Hkv, members]`, from `[Hkv, C + 1]` offsets."""
    index = torch.arange(members, device=offsets.device, dtype=offsets.dtype)
    index = index.expand(offsets.shape[0], members).contiguous()
    return torch.searchsorted(offsets[:, 1:].contiguous(), index, right=True)


def of_owners(of_nodes: Tensor, owner: Tensor) -> Tensor:
    """What every member has from the node that holds it.

    Args:
        of_nodes: `[B, Hkv, N, C]`; owner: `[Hkv, members]` (`owners`).

    Returns:
        `[B, Hkv, N, members]`.
    """
    return of_nodes.gather(3, owner.long()[None, :, None].expand(*of_nodes.shape[:3], -1))
