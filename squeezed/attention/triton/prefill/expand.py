"""Kernel of the prefill lookup that writes lists: members of kept nodes, and dropped nodes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _write_nodes(
    dropped,
    counts,
    node,
    log_size,
    variance,
    chosen,
    wide,
    chunk,
    chunks,
    live,
    capacity,
    CHUNKS: tl.constexpr,
    DIPOLE: tl.constexpr,
):
    """Append the `chosen` nodes to the lists of the tile, and write their length if first."""
    nodes, log_sizes, variances, count = dropped  # [T, capacity] three times, [T]
    other = tl.arange(0, CHUNKS)
    parts = tl.load(counts + wide * chunks + other, mask=other < live, other=0)
    base = tl.sum(tl.where(other < chunk, parts, 0), 0)
    at = base + tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(nodes + wide * capacity + at, node, mask=chosen)
    tl.store(log_sizes + wide * capacity + at, log_size, mask=chosen)
    if DIPOLE:
        tl.store(variances + wide * capacity + at, variance, mask=chosen)
    if chunk == 0:
        tl.store(count + wide, tl.sum(parts, 0))


@triton.jit(do_not_specialize=["nodes", "blocks", "chunks", "tiles", "capacity", "pinned"])
def expand_kernel(
    level,
    candidates,
    state,
    counts,
    found,
    dropped,
    nodes,
    blocks,
    chunks,
    tiles,
    capacity,
    pinned,
    HEADS_KV: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNKS: tl.constexpr,
    RUN: tl.constexpr,
    LISTED: tl.constexpr,
    FAR: tl.constexpr,
    DIPOLE: tl.constexpr,
):
    """Write the members of the kept nodes of one chunk, and the dropped nodes.

    Rows `0:pinned`, which every query reads, lead the list.
    """
    _, variance, key_offsets, member_offsets = level  # [Hkv, C], [Hkv, C + 1] twice
    listed, listed_count = candidates  # [T, C], [T]
    member_list, member_count = found  # [T, capacity], [T]
    pid, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    h, wide = (pid // blocks) % HEADS_KV, pid.to(tl.int64)
    length = tl.load(listed_count + pid) if LISTED else nodes
    if (chunk > 0) & (chunk * BLOCK_C >= length):
        return
    live = tl.cdiv(length, BLOCK_C)  # chunks that hold candidates
    slot = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = slot < length
    node = slot
    if LISTED:
        node = tl.load(listed + wide * nodes + slot, mask=inside, other=0)
    fate = tl.load(state + wide * nodes + slot, mask=inside, other=0)
    member = member_offsets + h * (nodes + 1) + node
    start = tl.load(member, mask=fate == 1, other=0)
    members = tl.load(member + 1, mask=fate == 1, other=0) - start
    other = tl.arange(0, CHUNKS)
    parts = tl.load(counts + wide * chunks + other, mask=other < live, other=0)
    at = pinned + tl.sum(tl.where(other < chunk, parts, 0), 0) + tl.cumsum(members, 0) - members
    if chunk == 0:
        tl.store(member_count + pid, pinned + tl.sum(parts, 0))
        for first in range(0, pinned, BLOCK_C):
            row = first + tl.arange(0, BLOCK_C)
            tl.store(member_list + wide * capacity + row, row, mask=row < pinned)
    lane = tl.arange(0, RUN)
    for step in range(0, tl.max(members, 0), RUN):
        more = (step + lane)[None, :] < members[:, None]
        target = member_list + wide * capacity + at[:, None] + (step + lane)
        tl.store(target, start[:, None] + (step + lane), mask=more)
    if FAR:
        edge = key_offsets + h * (nodes + 1) + node
        size = tl.load(edge + 1, mask=inside, other=1) - tl.load(edge, mask=inside, other=0)
        log_size = tl.log2(tl.maximum(size, 1).to(tl.float32))
        variances = log_size
        if DIPOLE:
            variances = tl.load(variance + h * nodes + node, mask=fate == 2, other=0.0)
        _write_nodes(
            dropped,
            counts + tiles * chunks,
            node,
            log_size,
            variances,
            fate == 2,
            wide,
            chunk,
            chunks,
            live,
            nodes,
            CHUNKS,
            DIPOLE,
        )
