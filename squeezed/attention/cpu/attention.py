"""`attend` for the CPU: queries -> rows -> output, with the signature of the reference."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from squeezed.attention.cpu import decode, prefill
from squeezed.attention.cpu.arrays import SuffixRows
from squeezed.attention.cpu.rows import QueryRows, from_rows, to_rows
from squeezed.attention.cpu.threads import threads
from squeezed.attention.interface import Attended, Suffix
from squeezed.attention.scores import NEG_INF
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
    suffix: Suffix | None = None,
    valid: Tensor | None = None,
) -> Attended:
    """Squeezed attention, as `squeezed.attention.reference.attend` defines it.

    Keys, values and suffix are float32, bfloat16 or float16; sums are float32. Uses as many threads
    as `torch.get_num_threads()`. The first call of a dtype compiles (cached on disk afterwards).

    Raises:
        SqueezedError: keys or values of another dtype.
    """
    batch, heads, tokens, _ = query.shape
    keys_read = torch.zeros(batch, dtype=torch.int64)
    if tokens == 0:
        return Attended(torch.empty_like(query), torch.empty(batch, heads, 0), keys_read)
    rows = to_rows(query, layer.kv_heads, suffix, valid, rule.query_block, layer.scale)
    recent = SuffixRows.of(suffix, layer, batch)
    path = decode if rows.rows < PREFILL_ROWS else prefill
    outputs, masses, reads = [], [], []
    with threads():
        for slab in _slabs(rows, SLAB_ROWS[path]):
            output, log_mass, read = path.attend_units(slab, layer, rule, recent)
            outputs.append(output)
            masses.append(log_mass)
            reads.append(read * slab.valid.sum(-1))
    keys_read.index_add_(0, rows.batch, torch.cat(reads))
    output = from_rows(torch.cat(outputs, 1), query).to(query.dtype)
    log_mass = from_rows(torch.cat(masses, 1)[..., None], query)[..., 0]
    if valid is not None:
        padding = ~valid[:, None]
        output = output.masked_fill(padding[..., None], 0.0)
        log_mass = log_mass.masked_fill(padding, NEG_INF)
    return Attended(output, log_mass, keys_read)


def _slabs(rows: QueryRows, most_rows: int) -> Iterator[QueryRows]:
    step = max(1, most_rows // rows.rows)
    for start in range(0, rows.units, step):
        yield rows.slab(start, min(start + step, rows.units))
