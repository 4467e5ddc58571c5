"""Prefill of the user's tokens over a squeezed context: the launcher of the Triton kernels.

One call is eight launches with two levels (normaliser; select and expand per level; plan;
attention; combine), none of which waits for the host, so it can be captured in a CUDA graph.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from squeezed.attention.interface import Attended, Suffix, in_sequence
from squeezed.attention.triton.gpus import compiled_or_refused
from squeezed.attention.triton.prefill.lookup import geometry, lookup
from squeezed.attention.triton.prefill.work import Work, choose_tile
from squeezed.context.layers import ClusteredLayer
from squeezed.context.rule import SelectionRule

WORK_BYTES = 1 << 29
"""Most bytes of row lists and partial outputs; longer prompts go in pieces of whole blocks."""


@compiled_or_refused()
def prefill(
    query: Tensor,
    layer: ClusteredLayer,
    rule: SelectionRule,
    suffix: Suffix | None = None,
    valid: Tensor | None = None,
) -> Attended:
    """Squeezed attention of `Q` new tokens, block by block of `rule.query_block`.

    Arguments and results are those of `squeezed.attention.reference.attend`.
    """
    query, rows = _rows_contiguous(query), query.shape[2]
    if suffix is not None:
        keys, values = map(_rows_contiguous, (suffix.keys, suffix.values))
        suffix = Suffix(keys, values, suffix.mask)
    if valid is not None:
        valid = valid.to(torch.int8)
    parts = []
    for first, last in _pieces(query, layer, rule):
        recent = None if suffix is None else suffix.of_rows(first, last, rows)
        real = None if valid is None else valid[:, first:last].contiguous()
        parts.append(_attend_piece(query[:, :, first:last], layer, rule, recent, real))
    return in_sequence(parts)  # one, as a rule: no launch more than needed


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _pieces(query: Tensor, layer: ClusteredLayer, rule: SelectionRule) -> list[tuple[int, int]]:
    """Row ranges whose lists and partial outputs fit in `WORK_BYTES`, cut between blocks."""
    batch, heads, rows, dim = query.shape
    lists = layer.kv_heads * max(1, layer.clustered)
    partial = 3 * heads * min(rule.query_block, rows) * dim  # a tile is cut in two on average
    step = max(1, WORK_BYTES // (4 * batch * (lists + partial))) * rule.query_block
    cuts = [*range(rows, 0, -step), 0]
    return [(first, last) for last, first in itertools.pairwise(cuts)][::-1]


def _attend_piece(
    query: Tensor,
    layer: ClusteredLayer,
    rule: SelectionRule,
    suffix: Suffix | None,
    valid: Tensor | None,
) -> Attended:
    """One piece; `valid [B, Q]` int8."""
    sizes = geometry(query, layer, rule)
    found = lookup(query, layer, rule, sizes, valid)
    tile = choose_tile(query, sizes, rule.far_field, layer.rows.codes is not None)
    work = Work(sizes, layer, rule, found, tile)
    ends, bounds, keys_read = work.plan(valid, suffix)
    partials = work.attend_lists(query, suffix, ends, bounds)
    return Attended(*work.combine(query, valid, ends, bounds, partials), keys_read)
