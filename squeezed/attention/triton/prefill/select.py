"""Kernels of the prefill lookup that score: the normaliser, and what every tile keeps or drops.

Tiles are numbered `(b * Hkv + h) * N + n`; logarithms are base 2. The launcher is
`squeezed.attention.triton.prefill.lookup`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from squeezed.attention.triton.prefill.normaliser import (
    LOG2E,
    normaliser,
    query_energy,
)

LOWEST: tl.constexpr = tl.constexpr(-1e30)
"""Stands for a threshold of minus infinity, which would make NaN of padded rows."""


@triton.jit
def tile_rows(pid, index, blocks, rows, BLOCK: tl.constexpr):
    """Query row of member `index` of the block of tile `pid`; blocks end at the last row."""
    return rows - (blocks - pid % blocks) * BLOCK + index


@triton.jit
def _query_tile(
    q_base,
    row_stride,
    first,
    start,
    valid,
    alpha,
    partial,
    lead,
    rows,
    splits,
    scale,
    threshold,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr,
    SECOND: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Queries `[BLOCK_R, D]` of one head, their energy, and the logit that meets the threshold.

    That logit is infinite for rows outside the block and for padding: they keep nothing.
    """
    dims = tl.arange(0, BLOCK_D)
    index = start + tl.arange(0, BLOCK_R)
    row = first + index
    ok = (index < BLOCK) & (row >= 0)
    if MASKED:
        ok = ok & (tl.load(valid + row, mask=ok, other=0) != 0)
    q_rows = q_base + row[:, None].to(tl.int64) * row_stride
    q = tl.load(q_rows + dims, mask=ok[:, None] & (dims < DIM), other=0.0)
    bar = normaliser(partial, lead + row, ok, splits, SPLITS) + threshold
    return q, query_energy(q, alpha, scale), tl.where(ok, bar, float("inf")), ok


@triton.jit
def _weights(q, energy, bar, nodes, variance, scale):
    """Score over threshold, added up over the rows of `q`, `[nodes]`."""
    first = tl.dot(nodes, tl.trans(q), input_precision="ieee") * scale
    logits = (first + variance[:, None] * energy[None, :]) * LOG2E
    return tl.sum(tl.exp2(logits - bar[None, :]), 1)


@triton.jit
def _store_sum(target, values, BLOCK_C: tl.constexpr):
    """Store the sum of `values [BLOCK_C]`, as a matrix of one row.

    Triton 3.6 and 3.7 do not compile the sum of a vector that came from a product for a B200.
    """
    tl.store(target + tl.arange(0, 1), tl.sum(tl.reshape(values, (1, BLOCK_C)), 1))


@triton.jit(do_not_specialize=["rows", "nodes", "blocks", "chunks", "tiles", "splits", "spans"])
def select_kernel(
    query,
    valid,
    level,
    alpha,
    partial,
    candidates,
    state,
    counts,
    rows,
    nodes,
    blocks,
    chunks,
    tiles,
    splits,
    spans,
    scale,
    thresholds,
    HEADS_KV: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPLITS: tl.constexpr,
    SECOND: tl.constexpr,
    MASKED: tl.constexpr,
    LISTED: tl.constexpr,
    FAR: tl.constexpr,
):
    """Keep or drop every `spans`-th chunk of one tile's candidates; count what becomes of them.

    The mean score of a block exceeds the threshold T when the scores over T add up to more than the
    block has rows: one pass, and nothing that overflows or underflows changes the answer.
    """
    queries, batch_stride, head_stride, row_stride = query  # [B, Hq, Q, D]
    centroids, variance, key_offsets, member_offsets = level  # [Hkv, C, D], [Hkv, C], [Hkv, C + 1]
    listed, listed_count = candidates  # [T, C], [T]
    pid, span = tl.program_id(0) // spans, tl.program_id(0) % spans
    h, b, wide = (pid // blocks) % HEADS_KV, pid // blocks // HEADS_KV, pid.to(tl.int64)
    length = tl.load(listed_count + pid) if LISTED else nodes
    SINGLE: tl.constexpr = (GROUP == 1) and (BLOCK <= BLOCK_R)
    dims, lane = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_C)
    q_base = queries + b.to(tl.int64) * batch_stride + (h * GROUP).to(tl.int64) * head_stride
    lead = (b * HEADS_KV + h).to(tl.int64) * GROUP * rows
    first = tile_rows(pid, 0, blocks, rows, BLOCK)
    mine = valid + b.to(tl.int64) * rows
    threshold = tl.maximum(tl.load(thresholds + h) * LOG2E, LOWEST)
    q, energy, bar, ok = _query_tile(
        q_base,
        row_stride,
        first,
        0,
        mine,
        tl.load(alpha + h * GROUP) if SECOND else 0.0,
        partial,
        lead,
        rows,
        splits,
        scale,
        threshold,
        BLOCK,
        DIM,
        BLOCK_D,
        BLOCK_R,
        SPLITS,
        SECOND,
        MASKED,
    )
    count = tl.sum(ok.to(tl.int32), 0)
    node = span * BLOCK_C + lane
    if LISTED:
        node = tl.load(listed + wide * nodes + node, mask=node < length, other=0)
    for chunk in range(span, tl.cdiv(length, BLOCK_C), spans):
        slot = chunk * BLOCK_C + lane
        inside = slot < length
        c_rows = centroids + (h.to(tl.int64) * nodes + node[:, None]) * DIM
        c = tl.load(c_rows + dims, mask=inside[:, None] & (dims < DIM), other=0.0)
        variances = tl.zeros([BLOCK_C], tl.float32)
        if SECOND:
            variances = tl.load(variance + h * nodes + node, mask=inside, other=0.0)
        member = member_offsets + h * (nodes + 1) + node
        members = tl.load(member + 1, mask=inside, other=0)
        members -= tl.load(member, mask=inside, other=0)
        there = inside
        if FAR:  # an empty node must count as nothing; to keep it costs nothing
            edge = key_offsets + h * (nodes + 1) + node
            size = tl.load(edge + 1, mask=inside, other=0) - tl.load(edge, mask=inside, other=0)
            there = size > 0
        if SINGLE:
            wanted = _weights(q, energy, bar, c, variances, scale) > count
        else:
            wanted, count = _any_head(
                q_base,
                head_stride,
                row_stride,
                first,
                mine,
                alpha + h * GROUP,
                partial,
                lead,
                c,
                variances,
                rows,
                splits,
                scale,
                threshold,
                GROUP,
                BLOCK,
                DIM,
                BLOCK_D,
                BLOCK_R,
                BLOCK_C,
                SPLITS,
                SECOND,
                MASKED,
            )
        kept = wanted & there
        dropped = there & ~kept
        fate = tl.where(kept, 1, tl.where(dropped, 2, 0))
        tl.store(state + wide * nodes + slot, fate.to(tl.int8), mask=inside)
        out = counts + pid * chunks + chunk
        _store_sum(out, tl.where(kept, members, 0), BLOCK_C)
        if FAR:
            _store_sum(out + tiles * chunks, dropped.to(tl.int32), BLOCK_C)
        node = slot + spans * BLOCK_C
        if LISTED:  # one chunk ahead, so that no centroid waits for its address
            node = tl.load(listed + wide * nodes + node, mask=node < length, other=0)


@triton.jit
def _any_head(
    q_base,
    head_stride,
    row_stride,
    first,
    valid,
    alpha,
    partial,
    lead,
    nodes_tile,
    variance,
    rows,
    splits,
    scale,
    threshold,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPLITS: tl.constexpr,
    SECOND: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Whether any head of the group wants each node, `[BLOCK_C]`, and the block's valid rows."""
    wanted = tl.zeros([BLOCK_C], tl.int32)
    count = 0
    for g in range(GROUP):
        total = tl.zeros([BLOCK_C], tl.float32)
        count = 0
        for start in range(0, BLOCK, BLOCK_R):
            q, energy, bar, ok = _query_tile(
                q_base + g * head_stride,
                row_stride,
                first,
                start,
                valid,
                tl.load(alpha + g) if SECOND else 0.0,
                partial,
                lead + g * rows,
                rows,
                splits,
                scale,
                threshold,
                BLOCK,
                DIM,
                BLOCK_D,
                BLOCK_R,
                SPLITS,
                SECOND,
                MASKED,
            )
            total += _weights(q, energy, bar, nodes_tile, variance, scale)
            count += tl.sum(ok.to(tl.int32), 0)
        wanted = wanted | (total > count).to(tl.int32)
    return wanted != 0, count
