"""Prefill of the user's tokens over a squeezed context: the launcher of the Triton kernels.

One call is eight launches with two levels (normaliser; select and expand per level; plan;
attention; combine), none of which waits for the host, so it can be captured in a CUDA graph.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from squeezed.attention.triton.gpus import compiled_or_refused
from squeezed.attention.triton.prefill.lookup import geometry, lookup
from squeezed.attention.triton.prefill.work import Work, choose_tile
from squeezed.context.layers import ClusteredLayer
from squeezed.context.rule import SelectionRule

WORK_BYTES = 1 << 29
"""Most bytes of row lists and partial outputs; longer prompts go in pieces of whole blocks."""


@compiled_or_refused()
def attend(
    query: Tensor,
    layer: ClusteredLayer,
    rule: SelectionRule,
    suffix_keys: Tensor,
    suffix_values: Tensor,
    suffix_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Squeezed attention of `Q` new tokens, block by block of `rule.query_block`.

    Arguments and results are those of `squeezed.attention.reference.attend`: `query [B, Hq, Q, D]`,
    `suffix_keys, suffix_values [B, Hkv, S, D]`, `suffix_mask [B, 1, Q, S]` bool or `None` for
    causal; output in the shape and dtype of `query`, keys read `[B]` int64.
    """
    query, suffix_keys, suffix_values = map(_rows_contiguous, (query, suffix_keys, suffix_values))
    rows, suffix = query.shape[2], suffix_keys.shape[2]
    outputs, keys_read = [], []
    for first, last in _pieces(query, layer, rule):
        seen = suffix if suffix_mask is not None else max(0, suffix - (rows - last))
        output, read = _attend_piece(
            query[:, :, first:last], layer, rule, suffix_keys[:, :, :seen],
            suffix_values[:, :, :seen],
            None if suffix_mask is None else suffix_mask[:, :, first:last], scale,
        )  # fmt: skip
        outputs.append(output)
        keys_read.append(read)
    if len(outputs) == 1:  # as a rule: no launch more than needed
        return outputs[0], keys_read[0]
    return torch.cat(outputs, 2), torch.stack(keys_read).sum(0)


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _pieces(query: Tensor, layer: ClusteredLayer, rule: SelectionRule) -> list[tuple[int, int]]:
    """Row ranges whose lists and partial outputs fit in `WORK_BYTES`, cut between blocks."""
    batch, heads, rows, dim = query.shape
    lists = layer.keys.shape[0] * max(1, layer.clustered)
    partial = 3 * heads * min(rule.query_block, rows) * dim  # a tile is cut in two on average
    step = max(1, WORK_BYTES // (4 * batch * (lists + partial))) * rule.query_block
    cuts = [*range(rows, 0, -step), 0]
    return [(first, last) for last, first in itertools.pairwise(cuts)][::-1]


def _attend_piece(
    query: Tensor, layer: ClusteredLayer, rule: SelectionRule,
    suffix_keys: Tensor, suffix_values: Tensor, suffix_mask: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    valid = _valid_rows(query, suffix_keys, suffix_mask)
    sizes = geometry(query, layer, rule)
    found = lookup(query, layer, rule, sizes, valid, scale)
    tile = choose_tile(query, sizes, rule.far_field)
    work = Work(sizes, layer, rule, found, tile)
    ends, bounds, keys_read = work.plan(valid, suffix_keys.shape[2], suffix_mask is None)
    parts = work.attend(query, suffix_keys, suffix_values, suffix_mask, ends, bounds, scale)
    return work.combine(query, ends, bounds, parts, scale), keys_read


def _valid_rows(query: Tensor, suffix_keys: Tensor, suffix_mask: Tensor | None) -> Tensor | None:
    """`[B, Q]` int8, nonzero where a row attends to any suffix token; `None` if all rows do."""
    batch, _, rows, _ = query.shape
    if suffix_mask is not None:
        return suffix_mask.any(-1)[:, 0].expand(batch, rows).to(torch.int8).contiguous()
    short = rows - suffix_keys.shape[2]
    if short <= 0:
        return None
    row = torch.arange(rows, device=query.device)
    return (row >= short).to(torch.int8).expand(batch, rows).contiguous()
