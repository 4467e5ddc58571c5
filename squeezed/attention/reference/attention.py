"""Kept keys, far field, pinned keys and recent keys -> output, in one softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from squeezed.attention.interface import causal_mask
from squeezed.attention.reference.lookup import Lookup, lookup
from squeezed.attention.scores import NEG_INF, grouped, owners, query_blocks
from squeezed.context.layers import ClusteredLayer
from squeezed.context.rule import SelectionRule


def attend(
    query: Tensor,
    layer: ClusteredLayer,
    rule: SelectionRule,
    suffix_keys: Tensor,
    suffix_values: Tensor,
    suffix_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Squeezed attention of `Q` new tokens over a fixed context and the tokens after it.

    Args:
        query: `[B, Hq, Q, D]`.
        layer: the context's clustered keys and values.
        rule: thresholds, score and far field.
        suffix_keys, suffix_values: `[B, Hkv, S, D]`, user and generated tokens, the queries' own
            included; always attended densely.
        suffix_mask: `[B, 1, Q, S]` bool, True where attended; `None` is causal without padding.
        scale: softmax scale.

    Returns:
        Output `[B, Hq, Q, D]` in the dtype of `query`, and the number of clustered keys that every
        request reads, `[B]` int64, summed over KV heads and query tokens.
    """
    q = grouped(query, layer.keys.shape[0])
    rows, suffix = q.shape[3], suffix_keys.shape[2]
    if suffix_mask is None:
        suffix_mask = causal_mask(rows, suffix, q.device)
    valid = suffix_mask.any(-1)[:, 0].expand(q.shape[0], rows)  # padding attends to nothing

    recent = scale * torch.einsum("bhgqd,bhsd->bhgqs", q, suffix_keys.to(q.dtype))
    recent = recent.masked_fill(~suffix_mask[:, :, None], NEG_INF)
    context = scale * torch.einsum("bhgqd,hpd->bhgqp", q, layer.keys.to(q.dtype))
    parts = [(recent, suffix_values.to(q.dtype))]
    keys_read, far_variance = torch.zeros(q.shape[0], device=q.device), None
    if layer.levels:
        found = lookup(query, layer, rule, scale, valid)
        context = context.masked_fill(~_rows_read(found, layer, rule, rows), NEG_INF)
        if rule.far_field != "none":
            parts.append((found.far_logits, found.far_values.expand(q.shape[0], -1, -1, -1)))
        if rule.far_field == "second_order":
            far_variance = found.far_variance
        keys_read = _keys_read(found, layer, rule, valid)
    parts.append((context, layer.values.to(q.dtype).expand(q.shape[0], -1, -1, -1)))
    weights = softmax_or_nothing(torch.cat([logits for logits, _ in parts], -1))
    output = torch.einsum("bhgqk,bhkd->bhgqd", weights, torch.cat([v for _, v in parts], 2))
    if far_variance is not None:
        of_far = weights[..., suffix : suffix + far_variance.shape[-1]]
        output = output + _tilt(of_far, far_variance, q, layer, scale)
    return output.reshape(query.shape).to(query.dtype), keys_read.to(torch.int64)


def softmax_or_nothing(logits: Tensor) -> Tensor:
    """Softmax over the last dimension; 0 in rows that attend to nothing. NaN stays NaN."""
    return torch.softmax(logits, -1).masked_fill((logits == NEG_INF).all(-1, keepdim=True), 0.0)


def _tilt(
    weights: Tensor, variance: Tensor, q: Tensor, layer: ClusteredLayer, scale: float
) -> Tensor:
    """How far queries move the values that stand for dropped nodes, `[B, Hkv, G, Q, D]`.

    Args:
        weights: `[B, Hkv, G, Q, F]`, of the nodes; variance: `[Hkv, F]`; q: `[B, Hkv, G, Q, D]`.
    """
    moved = scale * torch.einsum("bhgqe,hde->bhgqd", q, layer.value_slope.to(q.dtype))
    return torch.einsum("bhgqf,hf->bhgq", weights, variance)[..., None] * moved


def _rows_read(found: Lookup, layer: ClusteredLayer, rule: SelectionRule, rows: int) -> Tensor:
    """Which sorted rows every query reads, `[B, Hkv, 1, Q, P]` bool."""
    leaf = owners(layer.levels[-1].key_offsets, layer.tokens)[:, layer.pinned :]
    batch, _, blocks, _ = found.kept.shape
    read = found.kept.gather(3, leaf[None, :, None, :].expand(batch, -1, blocks, -1))
    pinned = torch.ones_like(read[..., :1]).expand(-1, -1, -1, layer.pinned)
    block_of = query_blocks(rows, rule.query_block, read.device)
    return torch.cat([pinned, read], -1)[:, :, block_of].unsqueeze(2)


def _keys_read(found: Lookup, layer: ClusteredLayer, rule: SelectionRule, valid: Tensor) -> Tensor:
    read = torch.einsum("bhnc,hc->bn", found.kept.double(), layer.levels[-1].sizes.double())
    block_of = query_blocks(valid.shape[1], rule.query_block, valid.device)
    return (read[:, block_of] * valid).sum(-1)
