"""Kernels of the prefill lookup: normaliser, selection, and expansion of kept nodes into lists.

Tiles are numbered `(b * Hkv + h) * N + n`; logarithms are base 2. The launcher is
`squeezed.ops.triton.prefill_lookup`.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


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
def _log_sum(peak, total, logits):
    """Add the columns of `logits` to a running (peak, sum of exp2) of every row."""
    top = tl.maximum(peak, tl.max(logits, 1))
    base = tl.where(top == float("-inf"), 0.0, top)
    total = total * tl.exp2(peak - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
    return top, total


@triton.jit
def normaliser_kernel(
    query, q_b, q_h, q_r, keys, centroids, variance, offsets, alpha, partial,
    rows, tokens, pinned, nodes, splits, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, SPLIT: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """One share of the softmax denominator of `BLOCK_R` rows of one query head."""
    split = tl.program_id(1)
    tiles_r = tl.cdiv(rows, BLOCK_R)
    head, b = (tl.program_id(0) // tiles_r) % HEADS, tl.program_id(0) // tiles_r // HEADS
    row = (tl.program_id(0) % tiles_r) * BLOCK_R + tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_D)
    kv = (head // GROUP).to(tl.int64)
    q_rows = (
        query + b.to(tl.int64) * q_b + head.to(tl.int64) * q_h + row[:, None].to(tl.int64) * q_r
    )
    q = tl.load(q_rows + dims, mask=(row < rows)[:, None] & (dims < DIM), other=0.0)
    energy = query_energy(q, tl.load(alpha + head) if SECOND else 0.0, scale)
    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    if split == splits - 1:
        for at in range(0, pinned, BLOCK_C):
            key = at + tl.arange(0, BLOCK_C)
            inside = (key < pinned)[:, None] & (dims < DIM)
            k = tl.load(keys + (kv * tokens + key[:, None]) * DIM + dims, mask=inside, other=0.0)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
            peak, total = _log_sum(peak, total, tl.where(key < pinned, logits, float("-inf")))
    else:
        for at in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, nodes), BLOCK_C):
            node = at + tl.arange(0, BLOCK_C)
            inside = node < nodes
            c_rows = centroids + (kv * nodes + node[:, None]) * DIM
            c = tl.load(c_rows + dims, mask=inside[:, None] & (dims < DIM), other=0.0)
            spread = tl.load(variance + kv * nodes + node, mask=inside, other=0.0)
            edge = offsets + kv * (nodes + 1) + node
            size = tl.load(edge + 1, mask=inside, other=0) - tl.load(edge, mask=inside, other=0)
            mass = tl.where(size > 0, tl.log2(tl.maximum(size, 1).to(tl.float32)), float("-inf"))
            logits = lookup_logits(q, c, energy, spread, scale) + mass[None, :]
            peak, total = _log_sum(peak, total, logits)
    out = partial + ((b * HEADS + head).to(tl.int64) * rows + row) * splits + split
    tl.store(out, peak + tl.log2(total), mask=row < rows)  # log2(0) = -inf: nothing here


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
def _block_scores(
    q_base, q_h, q_r, first, valid, alpha, partial, nodes_tile, variance, rows, scale, splits, lead,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, SPLITS: tl.constexpr, SECOND: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """log2 of the mean score over the block's rows, largest of the group's heads, `[BLOCK_C]`."""
    dims = tl.arange(0, BLOCK_D)
    best = tl.full([BLOCK_C], float("-inf"), tl.float32)
    for g in range(GROUP):
        weight = tl.load(alpha + g) if SECOND else 0.0
        peak = tl.full([BLOCK_C], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_C], tl.float32)
        count = 0
        for start in range(0, BLOCK, BLOCK_R):
            index = start + tl.arange(0, BLOCK_R)
            row = first + index
            ok = (index < BLOCK) & (row >= 0)
            if MASKED:
                ok = ok & (tl.load(valid + row, mask=ok, other=0) != 0)
            count += tl.sum(ok.to(tl.int32), 0)
            q_rows = q_base + g * q_h + row[:, None].to(tl.int64) * q_r
            q = tl.load(q_rows + dims, mask=ok[:, None] & (dims < DIM), other=0.0)
            x = lookup_logits(q, nodes_tile, query_energy(q, weight, scale), variance, scale)
            x -= _normaliser(partial, lead + g * rows + row, ok, splits, SPLITS)[:, None]
            x = tl.where(ok[:, None], x, float("-inf"))
            top = tl.maximum(peak, tl.max(x, 0))
            base = tl.where(top == float("-inf"), 0.0, top)
            total = total * tl.exp2(peak - base) + tl.sum(tl.exp2(x - base[None, :]), 0)
            peak = top
        mean = peak + tl.log2(total) - tl.log2(tl.maximum(count, 1).to(tl.float32))
        best = tl.maximum(best, tl.where(total > 0, mean, float("-inf")))
    return best


@triton.jit
def select_kernel(
    query, q_b, q_h, q_r, valid, centroids, variance, key_offsets, member_offsets, alpha, partial,
    candidates, candidate_count, state, counts,
    rows, nodes, blocks, chunks, tiles, splits, scale, threshold,
    HEADS_KV: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, SPLITS: tl.constexpr,
    SECOND: tl.constexpr, MASKED: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Keep or drop `BLOCK_C` candidates of one tile; count members, drops and keeps."""
    pid, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    h, b = (pid // blocks) % HEADS_KV, pid // blocks // HEADS_KV
    wide = pid.to(tl.int64)
    length = tl.load(candidate_count + pid) if LISTED else nodes
    slot = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = slot < length
    out = counts + pid * chunks + chunk
    if chunk * BLOCK_C >= length:
        for kind in tl.static_range(3):
            tl.store(out + kind * tiles * chunks, 0)
        return
    node = slot
    if LISTED:
        node = tl.load(candidates + wide * nodes + slot, mask=inside, other=0)
    edge = key_offsets + h * (nodes + 1) + node
    size = tl.load(edge + 1, mask=inside, other=0) - tl.load(edge, mask=inside, other=0)
    dims = tl.arange(0, BLOCK_D)
    c_rows = centroids + (h.to(tl.int64) * nodes + node[:, None]) * DIM
    c = tl.load(c_rows + dims, mask=inside[:, None] & (dims < DIM), other=0.0)
    spread = tl.load(variance + h * nodes + node, mask=inside, other=0.0)
    q_base = query + b.to(tl.int64) * q_b + (h * GROUP).to(tl.int64) * q_h
    lead = (b * HEADS_KV + h).to(tl.int64) * GROUP * rows
    score = _block_scores(
        q_base, q_h, q_r, tile_rows(pid, 0, blocks, rows, BLOCK), valid + b.to(tl.int64) * rows,
        alpha + h * GROUP, partial, c, spread, rows, scale, splits, lead,
        GROUP, BLOCK, DIM, BLOCK_D, BLOCK_R, BLOCK_C, SPLITS, SECOND, MASKED,
    )  # fmt: skip
    alive = size > 0
    kept = alive & (score > threshold)
    tl.store(state + wide * nodes + slot, tl.where(kept, 1, tl.where(alive, 2, 0)), mask=inside)
    member = member_offsets + h * (nodes + 1) + node
    members = tl.load(member + 1, mask=kept, other=0) - tl.load(member, mask=kept, other=0)
    tl.store(out, tl.sum(members, 0))
    tl.store(out + tiles * chunks, tl.sum((alive & ~kept).to(tl.int32), 0))
    tl.store(out + 2 * tiles * chunks, tl.sum(kept.to(tl.int32), 0))


@triton.jit
def _write_nodes(list_, count, counts, node, chosen, wide, chunk, chunks, capacity,
                 CHUNKS: tl.constexpr):  # fmt: skip
    """Append the `chosen` nodes of this chunk to the tile's list, and its length if first."""
    other = tl.arange(0, CHUNKS)
    parts = tl.load(counts + wide * chunks + other, mask=other < chunks, other=0)
    base = tl.sum(tl.where(other < chunk, parts, 0), 0)
    at = base + tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(list_ + wide * capacity + at, node, mask=chosen)
    if chunk == 0:
        tl.store(count + wide, tl.sum(parts, 0))


@triton.jit
def expand_kernel(
    member_offsets, candidates, candidate_count, state, counts,
    member_list, member_count, dropped_list, dropped_count, kept_list, kept_count,
    nodes, blocks, chunks, tiles, capacity,
    HEADS_KV: tl.constexpr, BLOCK_C: tl.constexpr, CHUNKS: tl.constexpr, RUN: tl.constexpr,
    LISTED: tl.constexpr, DROPPED: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Write the members of the kept nodes of one chunk, the dropped nodes and the kept ones."""
    pid, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    h, wide = (pid // blocks) % HEADS_KV, pid.to(tl.int64)
    length = tl.load(candidate_count + pid) if LISTED else nodes
    if (chunk > 0) & (chunk * BLOCK_C >= length):
        return
    slot = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = slot < length
    node = slot
    if LISTED:
        node = tl.load(candidates + wide * nodes + slot, mask=inside, other=0)
    fate = tl.load(state + wide * nodes + slot, mask=inside, other=0)
    member = member_offsets + h * (nodes + 1) + node
    start = tl.load(member, mask=fate == 1, other=0)
    members = tl.load(member + 1, mask=fate == 1, other=0) - start
    other = tl.arange(0, CHUNKS)
    parts = tl.load(counts + wide * chunks + other, mask=other < chunks, other=0)
    at = tl.sum(tl.where(other < chunk, parts, 0), 0) + tl.cumsum(members, 0) - members
    if chunk == 0:
        tl.store(member_count + pid, tl.sum(parts, 0))
    lane = tl.arange(0, RUN)
    for step in range(0, tl.max(members, 0), RUN):
        more = (step + lane)[None, :] < members[:, None]
        target = member_list + wide * capacity + at[:, None] + (step + lane)
        tl.store(target, start[:, None] + (step + lane), mask=more)
    if DROPPED:
        _write_nodes(dropped_list, dropped_count, counts + tiles * chunks, node, fate == 2,
                     wide, chunk, chunks, nodes, CHUNKS)  # fmt: skip
    if KEPT:
        _write_nodes(kept_list, kept_count, counts + 2 * tiles * chunks, node, fate == 1,
                     wide, chunk, chunks, nodes, CHUNKS)  # fmt: skip
