"""Kept keys, far field, pinned keys and recent keys -> output, in one softmax."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from squeezed.attention.interface import Attended, Suffix
from squeezed.attention.reference.lookup import Lookup, lookup
from squeezed.attention.scores import NEG_INF, grouped, of_owners, owners, query_blocks
from squeezed.context.encoding import wide
from squeezed.context.layers import ClusteredLayer
from squeezed.context.rule import SelectionRule


def attend(
    query: Tensor,
    layer: ClusteredLayer,
    rule: SelectionRule,
    suffix: Suffix | None = None,
    valid: Tensor | None = None,
) -> Attended:
    """Squeezed attention of `Q` new tokens over a fixed context and the tokens after it.

    Args:
        query: `[B, Hq, Q, D]`.
        layer: the context's clustered keys and values, and the softmax scale.
        rule: thresholds, score and far field.
        suffix: each request's own tokens; `None` attends to the context alone.
        valid: `[B, Q]` bool, False for padding, which selects nothing, moves no mean of its block
            and attends to nothing; `None` if no query is padding.

    Returns:
        Output, log mass and keys read; padding has 0, `-inf` and none.
    """
    q = grouped(query, layer.kv_heads)
    batch, rows = q.shape[0], q.shape[3]
    keys, values = wide(layer, q.dtype)
    context = layer.scale * torch.einsum("bhgqd,hpd->bhgqp", q, keys)
    parts, far_variance = [], None
    keys_read = torch.zeros(batch, dtype=torch.int64, device=q.device)
    if layer.levels:
        found = lookup(query, layer, rule, valid)
        context = context.masked_fill(~_rows_read(found, layer, rule, rows), NEG_INF)
        if rule.far_field != "none":
            parts.append((found.far_logits, found.far_values))
        if rule.far_field == "second_order":
            far_variance = found.far_variance
        keys_read = _keys_read(found, layer, rule, valid, rows)
    parts.append((context, values))
    if suffix is not None:
        parts.append((suffix.logits(q, layer.scale), suffix.values.to(q.dtype)))
    output, log_mass, weights = softmax_over(parts, valid)
    if far_variance is not None:
        of_far = weights[..., : far_variance.shape[-1]]
        output = output + _shift(of_far, far_variance, q, layer)
    output = output.reshape(query.shape).to(query.dtype)
    return Attended(output, log_mass.flatten(1, 2), keys_read)


def attend_suffix(
    query: Tensor, suffix: Suffix, scale: float, valid: Tensor | None = None
) -> Attended:
    """Dense attention to the suffix alone: what an engine's own kernel does with recent tokens."""
    q = grouped(query, suffix.keys.shape[1])
    parts = [(suffix.logits(q, scale), suffix.values.to(q.dtype))]
    output, log_mass, _ = softmax_over(parts, valid)
    nothing = torch.zeros(len(query), dtype=torch.int64, device=query.device)
    output = output.reshape(query.shape).to(query.dtype)
    return Attended(output, log_mass.flatten(1, 2), nothing)


def softmax_over(
    parts: list[tuple[Tensor, Tensor]], valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One softmax over the keys of all parts.

    Args:
        parts: logits `[B, Hkv, G, Q, K]` and values `[B, Hkv, K, D]`, or `[Hkv, K, D]` for all
            requests, of each.
        valid: `[B, Q]` bool, rows that attend to anything; `None` for all of them.

    Returns:
        Output `[B, Hkv, G, Q, D]`, log mass `[B, Hkv, G, Q]` and weights of all keys; 0 and `-inf`
        in rows that attend to nothing. NaN stays NaN.
    """
    logits = torch.cat([logits for logits, _ in parts], -1)
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None, :, None], NEG_INF)
    nothing = (logits == NEG_INF).all(-1, keepdim=True)
    weights = torch.softmax(logits, -1).masked_fill(nothing, 0.0)
    sizes = [part.shape[-1] for part, _ in parts]
    outputs = (
        torch.einsum("bhgqk,bhkd->bhgqd", share, values.expand(len(share), -1, -1, -1))
        for share, (_, values) in zip(weights.split(sizes, -1), parts, strict=True)
    )
    output = reduce(torch.add, outputs)
    return output, logits.logsumexp(-1), weights


def _shift(weights: Tensor, variance: Tensor, q: Tensor, layer: ClusteredLayer) -> Tensor:
    """How far queries move the values that stand for dropped nodes, `[B, Hkv, G, Q, D]`.

    Args:
        weights: `[B, Hkv, G, Q, F]`, of the nodes; variance: `[Hkv, F]`; q: `[B, Hkv, G, Q, D]`.
    """
    shift = layer.scale * torch.einsum("bhgqe,hde->bhgqd", q, layer.value_slope.to(q.dtype))
    return torch.einsum("bhgqf,hf->bhgq", weights, variance)[..., None] * shift


def _rows_read(found: Lookup, layer: ClusteredLayer, rule: SelectionRule, rows: int) -> Tensor:
    """Which sorted rows every query reads, `[B, Hkv, 1, Q, P]` bool."""
    leaf = owners(layer.levels[-1].key_offsets, layer.tokens)[:, layer.pinned :]
    read = of_owners(found.kept, leaf)
    pinned = torch.ones_like(read[..., :1]).expand(-1, -1, -1, layer.pinned)
    block_of = query_blocks(rows, rule.query_block, read.device)
    return torch.cat([pinned, read], -1)[:, :, block_of].unsqueeze(2)


def _keys_read(
    found: Lookup, layer: ClusteredLayer, rule: SelectionRule, valid: Tensor | None, rows: int
) -> Tensor:
    read = torch.einsum("bhnc,hc->bn", found.kept.double(), layer.levels[-1].sizes.double())
    of_rows = read[:, query_blocks(rows, rule.query_block, read.device)]
    return (of_rows if valid is None else of_rows * valid).sum(-1).long()
