"""Kernels of the prefill lookup that score: the normaliser, and what every tile keeps or drops.

Tiles are numbered `(b * Hkv + h) * N + n`; logarithms are base 2. The launcher is
`squeezed.attention.triton.prefill.lookup`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from squeezed.attention import scores

LOG2E: tl.constexpr = tl.constexpr(scores.LOG2E)
LOWEST: tl.constexpr = tl.constexpr(-1e30)
"""Stands for a threshold of minus infinity, which would make NaN of padded rows."""


@triton.jit
def tile_rows(pid, index, blocks, rows, BLOCK: tl.constexpr):
    """Query row of member `index` of the block of tile `pid`; blocks end at the last row."""
    return rows - (blocks - pid % blocks) * BLOCK + index


@triton.jit
def lookup_logits(q, nodes, energy, variance, scale):
    """`[rows, nodes]` logits in base 2, the second-order term included."""
    first = tl.dot(q, tl.trans(nodes), input_precision="ieee") * scale
    return (first + energy[:, None] * variance[None, :]) * LOG2E


@triton.jit
def query_energy(q, alpha, scale):
    """`alpha (s |q|)^2 / 2` of every row."""
    wide = q.to(tl.float32)
    return (0.5 * alpha * scale * scale) * tl.sum(wide * wide, 1)


@triton.jit
def _log_sum(peak, mass, logits):
    """Add the columns of `logits` to a running (peak, sum of exp2) of every row."""
    new = tl.maximum(peak, tl.max(logits, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    mass = mass * tl.exp2(peak - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
    return new, mass


@triton.jit
def _node_sizes(level, nodes, head, node, SECOND: tl.constexpr):
    """log2 of the sizes of nodes, `-inf` where there is none, and their key variances."""
    _, variance, key_offsets = level  # [Hkv, C], [Hkv, C + 1]
    head_nodes = head * nodes
    inside = node < nodes
    edge = key_offsets + head_nodes + head + node
    size = tl.load(edge + 1, mask=inside, other=0) - tl.load(edge, mask=inside, other=0)
    variances = tl.zeros_like(size).to(tl.float32)
    if SECOND:
        variances = tl.load(variance + head_nodes + node, mask=inside, other=0.0)
    log_size = tl.log2(tl.maximum(size, 1).to(tl.float32))
    return tl.where(size > 0, log_size, float("-inf")), variances


@triton.jit(do_not_specialize=["rows", "nodes", "splits", "share"])
def normaliser_kernel(
    query,
    level,
    alpha,
    partial,
    rows,
    nodes,
    splits,
    share,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SECOND: tl.constexpr,
):
    """A share of softmax denominators of `BLOCK_R` rows of a head, `partial [B, Hq, Q, splits]`."""
    queries, batch_stride, head_stride, row_stride = query  # [B, Hq, Q, D]
    centroids, _, _ = level  # [Hkv, C, D]
    split = tl.program_id(1)
    tiles_r = tl.cdiv(rows, BLOCK_R)
    head, b = (tl.program_id(0) // tiles_r) % HEADS, tl.program_id(0) // tiles_r // HEADS
    row = (tl.program_id(0) % tiles_r) * BLOCK_R + tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_D)
    kv = (head // GROUP).to(tl.int64)
    q_rows = queries + b.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride
    q_rows += row[:, None].to(tl.int64) * row_stride
    q = tl.load(q_rows + dims, mask=(row < rows)[:, None] & (dims < DIM), other=0.0)
    energy = query_energy(q, tl.load(alpha + head) if SECOND else 0.0, scale)
    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_R], tl.float32)
    node = split * share + tl.arange(0, BLOCK_C)
    log_size, variances = _node_sizes(level, nodes, kv, node, SECOND)
    for at in range(split * share, tl.minimum(split * share + share, nodes), BLOCK_C):
        node = at + tl.arange(0, BLOCK_C)
        c_rows = centroids + (kv * nodes + node[:, None]) * DIM
        c = tl.load(c_rows + dims, mask=(node < nodes)[:, None] & (dims < DIM), other=0.0)
        logits = lookup_logits(q, c, energy, variances, scale) + log_size[None, :]
        peak, mass = _log_sum(peak, mass, logits)
        log_size, variances = _node_sizes(level, nodes, kv, node + BLOCK_C, SECOND)  # a step ahead
    out = partial + ((b * HEADS + head).to(tl.int64) * rows + row) * splits + split
    tl.store(out, peak + tl.log2(mass), mask=row < rows)  # log2(0) = -inf: nothing here


@triton.jit
def _normaliser(partial, line, ok, splits, SPLITS: tl.constexpr):
    """Combine the shares of `normaliser_kernel` for the rows `line`."""
    split = tl.arange(0, SPLITS)
    inside = ok[:, None] & (split < splits)
    parts = tl.load(partial + line[:, None] * splits + split, mask=inside, other=float("-inf"))
    peak = tl.max(parts, 1)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    return base + tl.log2(tl.sum(tl.exp2(parts - base[:, None]), 1))


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
    bar = _normaliser(partial, lead + row, ok, splits, SPLITS) + threshold
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
