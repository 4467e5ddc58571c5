"""Kernels around the prefill attention: share out its work, and merge what was shared out.

The work of a tile (a request, a KV head, a block of queries, up to `BLOCK_M` of its rows) is a row
of *units*: of `BLOCK_N` pinned and kept rows, then of `OTHER_N` suffix tokens or dropped nodes,
level by level. `plan_kernel` lays all tiles end to end and the line is cut into passes of a few
heads; every program of the attention kernel takes an equal stretch of each pass, so heads that keep
many keys hold nobody up, and blocks of one head run side by side and find each other's keys in the
cache. `combine_kernel` merges the stretches of each tile. The stretch of program `p` in tile `w` of
a pass has slot `pass * programs + p + w`: along the line one of the three always grows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from squeezed.attention.triton.prefill.normaliser import LOG2E

NEG_INF: tl.constexpr = tl.constexpr(float("-inf"))
LENGTHS = """
    tokens mask_batch_stride mask_row_stride tiles blocks rows suffix capacity pass_tiles
""".split()
"""Arguments of the attention that differ from prompt to prompt: none must wait for a compiler."""


@triton.jit(do_not_specialize=["tiles", "blocks", "rows", "suffix", "pinned", "batch"])
def plan_kernel(
    plan,
    keys_read,
    row_count,
    dropped_counts,
    valid_count,
    tiles,
    blocks,
    rows,
    suffix,
    pinned,
    batch,
    HEADS_KV: tl.constexpr,
    SPLIT_M: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OTHER_N: tl.constexpr,
    LEVELS: tl.constexpr,
    CLASSES: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    STEP: tl.constexpr,
):
    """`bounds[w, c]`: first unit after class `c` of tile `w`; `ends[w]`: the same on the line."""
    ends, bounds = plan  # [W], [W, CLASSES]
    done = tl.zeros([], tl.int32)
    for at in range(0, batch, STEP):
        b = at + tl.arange(0, STEP)
        tl.store(keys_read + b, tl.zeros([STEP], tl.int64), mask=b < batch)
    tl.debug_barrier()  # the zeros come before the sums
    for at in range(0, tiles * SPLIT_M, STEP):
        w = at + tl.arange(0, STEP)
        inside = w < tiles * SPLIT_M
        t = w // SPLIT_M
        count = tl.load(row_count + t, mask=inside, other=pinned)
        from_end = (blocks - 1 - t % blocks) * BLOCK  # query rows after this block
        b = t // blocks // HEADS_KV
        valid = tl.minimum(rows - from_end, BLOCK)
        if MASKED:
            valid = tl.load(valid_count + b * blocks + t % blocks, mask=inside, other=0)
        reads = (count - pinned).to(tl.int64) * valid
        tl.atomic_add(keys_read + b, reads, mask=inside & (w % SPLIT_M == 0))
        units = tl.cdiv(count, BLOCK_N)
        tl.store(bounds + w * CLASSES, units, mask=inside)
        seen = tl.zeros([STEP], tl.int32) + suffix
        if CAUSAL:
            seen = tl.maximum(seen - from_end, 0)
        units += tl.cdiv(seen, OTHER_N)
        tl.store(bounds + w * CLASSES + 1, units, mask=inside)
        for level in tl.static_range(LEVELS):
            units += tl.cdiv(tl.load(dropped_counts[level] + t, mask=inside, other=0), OTHER_N)
            tl.store(bounds + w * CLASSES + 2 + level, units, mask=inside)
        units = tl.where(inside, units, 0)
        tl.store(ends + w, done + tl.cumsum(units, 0), mask=inside)
        done += tl.sum(units, 0)


@triton.jit
def tile_at(ends, first, last, unit, STEP: tl.constexpr):
    """Which of the tiles `first:last` holds `unit` of the line; `last` if none does."""
    found = first
    for at in range(first, last, STEP):
        w = at + tl.arange(0, STEP)
        end = tl.load(ends + w, mask=w < last, other=2147483647)
        found += tl.sum((end <= unit).to(tl.int32), 0)
    return found


@triton.jit
def stretch(ends, tiles, pass_tiles, number, program, programs):
    """Tiles `first:last` of a pass, and the units `begin:stop` of the line that a program takes."""
    first = number * pass_tiles
    last = tl.minimum(first + pass_tiles, tiles)
    base = tl.load(ends + first - 1, mask=first > 0, other=0)
    end = tl.load(ends + last - 1)
    share = tl.maximum(tl.cdiv(end - base, programs), 1)
    begin = tl.minimum(base + program * share, end)
    return first, last, begin, tl.minimum(begin + share, end), base, share


@triton.jit
def merge_shares(log_mass, more):
    """Shares of two log2 masses in their sum, and its log2."""
    peak = tl.maximum(log_mass, more)
    base = tl.where(peak == NEG_INF, 0.0, peak)
    a, b = tl.exp2(log_mass - base), tl.exp2(more - base)
    mass = tl.where(a + b > 0, a + b, 1.0)
    return a / mass, b / mass, base + tl.log2(a + b)


@triton.jit(do_not_specialize=["tiles", "blocks", "rows", "programs", "pass_tiles"])
def combine_kernel(
    query,
    slope,
    output,
    log_mass,
    valid,
    plan,
    partials,
    tiles,
    blocks,
    rows,
    programs,
    pass_tiles,
    scale,
    HEADS_KV: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLIT_M: tl.constexpr,
    CLASSES: tl.constexpr,
    DIPOLE: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Merge all stretches of `BLOCK_R` rows of one tile into output and log mass."""
    queries, batch_stride, head_stride, row_stride = query  # [B, Hq, Q, D]
    ends, bounds = plan  # [W], [W, CLASSES]
    outputs, log_masses, part_moved = partials  # [slots, BLOCK_M, DIM], [slots, BLOCK_M] twice
    w, m = tl.program_id(0), tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    number = w // pass_tiles
    _, _, _, _, base, share = stretch(ends, tiles * SPLIT_M, pass_tiles, number, 0, programs)
    end = tl.load(ends + w)
    start = end - tl.load(bounds + w * CLASSES + CLASSES - 1)
    p_first, p_last = (start - base) // share, (end - 1 - base) // share
    p_last = tl.where(end > start, p_last, p_first - 1)
    t, member = w // SPLIT_M, (w % SPLIT_M) * BLOCK_M + m
    head = (t // blocks) % HEADS_KV * GROUP + member // BLOCK
    row = rows - (blocks - t % blocks) * BLOCK + member % BLOCK
    dims, request = tl.arange(0, BLOCK_D), t // blocks // HEADS_KV
    there = (member < GROUP * BLOCK) & (row >= 0)
    ok = there[:, None] & (dims < DIM)
    out = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    merged, moved = tl.full([BLOCK_R], float("-inf"), tl.float32), tl.zeros([BLOCK_R], tl.float32)
    for p in tl.range(p_first, p_last + 1, loop_unroll_factor=4):  # several loads at once
        at = (number * programs + p + w).to(tl.int64) * BLOCK_M + m
        value = tl.load(outputs + at[:, None] * DIM + dims, mask=(dims < DIM)[None, :], other=0.0)
        old, new, merged = merge_shares(merged, tl.load(log_masses + at))
        out = out * old[:, None] + value * new[:, None]
        if DIPOLE:
            moved = moved * old + tl.load(part_moved + at) * new
    if DIPOLE:
        q_rows = queries + request.to(tl.int64) * batch_stride + head[:, None] * head_stride
        lines = slope + (t // blocks % HEADS_KV).to(tl.int64) * DIM * DIM
        shift = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        for first in tl.static_range(0, BLOCK_D, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            q_mask = there[:, None] & (k < DIM)
            q = q_rows + row[:, None].to(tl.int64) * row_stride + k
            q = tl.load(q, mask=q_mask, other=0.0)
            inside = (k < DIM)[:, None] & (dims < DIM)[None, :]
            matrix = tl.load(lines + dims[None, :] * DIM + k[:, None], mask=inside, other=0.0)
            shift = tl.dot(q, matrix, shift, input_precision="ieee")
        out += (moved * scale)[:, None] * shift
    if MASKED:  # padding attends to nothing
        real = tl.load(valid + request * rows + row, mask=there, other=0) != 0
        out, merged = tl.where(real[:, None], out, 0.0), tl.where(real, merged, NEG_INF)
    line = (request * (HEADS_KV * GROUP) + head).to(tl.int64) * rows + row
    tl.store(log_mass + line, merged / LOG2E, mask=there)
    tl.store(output + line[:, None] * DIM + dims, out.to(output.dtype.element_ty), mask=ok)
