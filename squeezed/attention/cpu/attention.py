"""`attend` for the CPU: queries -> rows -> output, with the signature of the reference."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from squeezed.attention.cpu import decode, prefill
from squeezed.attention.cpu.arrays import Suffix
from squeezed.attention.cpu.rows import QueryRows, from_rows, to_rows
from squeezed.attention.cpu.threads import threads
from squeezed.context.layers import ClusteredLayer
from squeezed.context.rule import SelectionRule

PREFILL_ROWS = 48
"""From this many rows per unit on, gathering keys for matrix products is the faster way."""

SLAB_ROWS = {decode: 128, prefill: 1024}
"""Query rows per KV head that are worked on at once; bounds the memory of what lies between."""


def attend(
    query: Tensor,
    layer: ClusteredLayer,
    rule: SelectionRule,
    suffix_keys: Tensor,
    suffix_values: Tensor,
    suffix_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Squeezed attention, as `squeezed.attention.reference.attend` defines it.

    Keys, values and suffix are float32, bfloat16 or float16; sums are float32. Uses as many threads
    as `torch.get_num_threads()`. The first call of a dtype compiles (cached on disk afterwards).

    Raises:
        SqueezedError: keys or values of another dtype.
    """
    if query.shape[2] == 0:
        return torch.empty_like(query), torch.zeros(query.shape[0], dtype=torch.int64)
    rows = to_rows(
        query, layer.keys.shape[0], suffix_mask, suffix_keys.shape[2], rule.query_block, scale
    )
    suffix = Suffix.of(suffix_keys, suffix_values)
    path = decode if rows.rows < PREFILL_ROWS else prefill
    outputs, reads = [], []
    with threads():
        for slab in _slabs(rows, SLAB_ROWS[path]):
            output, keys_read = path.attend_units(slab, layer, rule, suffix)
            outputs.append(output)
            reads.append(keys_read * slab.valid.sum(-1))
    keys_read = torch.zeros(query.shape[0], dtype=torch.int64)
    keys_read.index_add_(0, rows.batch, torch.cat(reads))
    return from_rows(torch.cat(outputs, 1), query), keys_read


def _slabs(rows: QueryRows, most_rows: int) -> Iterator[QueryRows]:
    step = max(1, most_rows // rows.rows)
    for start in range(0, rows.units, step):
        yield rows.slab(start, min(start + step, rows.units))
