"""Kernels for NVIDIA GPUs, written in Triton; one launcher per operation."""

from __future__ import annotations

import torch
from torch import Tensor

from squeezed.attention.interface import Attended, Suffix, in_sequence
from squeezed.attention.triton.decode import launch as decoding
from squeezed.attention.triton.decode import operator
from squeezed.attention.triton.decode.workspace import MAX_ROWS, power_of_two
from squeezed.attention.triton.prefill import launch as prefilling
from squeezed.context.layers import ClusteredLayer
from squeezed.context.rule import SelectionRule

__all__ = ["attend"]


def attend(
    query: Tensor,
    layer: ClusteredLayer,
    rule: SelectionRule,
    suffix: Suffix | None = None,
    valid: Tensor | None = None,
) -> Attended:
    """Squeezed attention on the GPU; `squeezed.attention.reference` has shapes and meaning."""
    if query.shape[2] == 1:
        step = operator if torch.compiler.is_compiling() else decoding
        return step.decode_step(query, layer, rule, suffix, valid)
    if rule.query_block == 1:
        return decode_tokens(query, layer, rule, suffix, valid)
    return prefilling.prefill(query, layer, rule, suffix, valid)


def decode_tokens(
    query: Tensor,
    layer: ClusteredLayer,
    rule: SelectionRule,
    suffix: Suffix | None = None,
    valid: Tensor | None = None,
) -> Attended:
    """Several tokens per request that select alone: every token is decoded as its own request.

    The tokens of a tile share the context, so each cluster is read once for all of them. Every size
    of a tile is compiled for, so the last one is filled up with padding: a question of another
    length finds its kernels compiled.
    """
    batch, heads, rows, _ = query.shape
    seen = None if suffix is None else suffix.seen(rows).expand(batch, -1, -1, -1)
    valid = query.new_ones(batch, rows, dtype=torch.bool) if valid is None else valid
    step = max(1, MAX_ROWS // (heads // layer.kv_heads))
    requests = []
    for request in range(batch):
        parts = []
        for start in range(0, rows, step):
            own = slice(start, start + step)
            part = query[request, :, own].transpose(0, 1).unsqueeze(2)
            count = len(part)
            tile = min(step, power_of_two(count))
            recent = None
            if suffix is not None and seen is not None:
                recent = Suffix(
                    suffix.keys[request].expand(tile, -1, -1, -1),
                    suffix.values[request].expand(tile, -1, -1, -1),
                    _filled(seen[request, 0, own, None, None], tile),
                )
            real = _filled(valid[request, own, None], tile)
            found = decoding.decode_step(_filled(part, tile), layer, rule, recent, real)
            parts.append(_as_rows(found, count))
        requests.append(in_sequence(parts))
    return Attended(*(torch.cat(each) for each in zip(*requests, strict=True)))


def _as_rows(found: Attended, count: int) -> Attended:
    """The first `count` requests of one token each, as one request of so many tokens."""
    output, log_mass = (x[:count, :, 0].transpose(0, 1)[None] for x in found[:2])
    return Attended(output, log_mass, found.keys_read.sum()[None])


def _filled(rows: Tensor, tile: int) -> Tensor:
    """Rows `[n, ...]` of a tile, with zero ones behind them up to its size, `[tile, ...]`."""
    missing = tile - len(rows)
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows
