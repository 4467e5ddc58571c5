"""Kernels for NVIDIA GPUs, written in Triton; one launcher per operation."""

from __future__ import annotations

import torch
from torch import Tensor

from squeezed.attention.interface import causal_mask
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
    suffix_keys: Tensor,
    suffix_values: Tensor,
    suffix_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Squeezed attention on the GPU; `squeezed.attention.reference` has shapes and meaning."""
    operands = (layer, rule, suffix_keys, suffix_values, suffix_mask, scale)
    if query.shape[2] == 1:
        step = operator if torch.compiler.is_compiling() else decoding
        return step.attend(query, *operands)
    if rule.query_block == 1:
        return attend_tokens(query, *operands)
    return prefilling.attend(query, *operands)


def attend_tokens(
    query: Tensor,
    layer: ClusteredLayer,
    rule: SelectionRule,
    suffix_keys: Tensor,
    suffix_values: Tensor,
    suffix_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Several tokens per request that select alone: every token is decoded as its own request.

    The tokens of a tile share the context, so each cluster is read once for all of them. Every size
    of a tile is compiled for, so the last one is filled up with rows that attend to nothing: a
    question of another length finds its kernels compiled.
    """
    batch, heads, rows, _ = query.shape
    if suffix_mask is None:
        suffix_mask = causal_mask(rows, suffix_keys.shape[2], query.device)
    suffix_mask = suffix_mask.expand(batch, -1, -1, -1)
    step = max(1, MAX_ROWS // (heads // layer.keys.shape[0]))
    outputs, keys_read = [], []
    for request in range(batch):
        parts, reads = [], []
        for start in range(0, rows, step):
            part = query[request, :, start : start + step].transpose(0, 1).unsqueeze(2)
            mask = suffix_mask[request, 0, start : start + step, None, None]
            count = part.shape[0]
            tile = min(step, power_of_two(count))
            output, read = decoding.attend(
                _filled(part, tile),
                layer,
                rule,
                suffix_keys[request].expand(tile, -1, -1, -1),
                suffix_values[request].expand(tile, -1, -1, -1),
                _filled(mask, tile),
                scale,
            )
            parts.append(output[:count, :, 0])
            reads.append(read.sum())
        outputs.append(torch.cat(parts).transpose(0, 1))
        keys_read.append(torch.stack(reads).sum())
    return torch.stack(outputs), torch.stack(keys_read)


def _filled(rows: Tensor, tile: int) -> Tensor:
    """Rows `[n, ...]` of a tile, with zero ones behind them up to its size, `[tile, ...]`."""
    missing = tile - len(rows)
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows
