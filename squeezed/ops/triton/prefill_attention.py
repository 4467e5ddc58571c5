"""Kernels of the prefill attention: share out the work, attend, and merge what was shared out.

The work of a tile (a request, a KV head, a block of queries, up to `BLOCK_M` of its rows) is a row
of *units* of `BLOCK_N` keys, in this order: kept rows, pinned rows, suffix, the dropped nodes of
each level, and the kept leaves' centroids if the far field calibrates itself. `plan_kernel` lays
all tiles end to end and the line is cut into passes of a few heads; every program of
`attention_kernel` takes an equal stretch of each pass, so heads that keep many keys hold nobody up,
and blocks of one head run side by side and find each other's keys in the cache. `combine_kernel`
merges the stretches of each tile. The stretch of program `p` in tile `w` of a pass has slot
`pass * programs + p + w`: along the line one of the three always grows.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEG_INF: tl.constexpr = tl.constexpr(float("-inf"))
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def plan_kernel(
    ends, bounds, keys_read, row_count, dropped_counts, kept_count, valid_count,
    tiles, blocks, rows, suffix, pinned,
    HEADS_KV: tl.constexpr, SPLIT_M: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    LEVELS: tl.constexpr, CLASSES: tl.constexpr, CALIBRATED: tl.constexpr, INDEXED: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """`bounds[w, c]`: first unit after class `c` of tile `w`; `ends[w]`: the same on the line."""
    done = tl.zeros([], tl.int32)
    for at in range(0, tiles * SPLIT_M, STEP):
        w = at + tl.arange(0, STEP)
        inside = w < tiles * SPLIT_M
        t = w // SPLIT_M
        units = tl.zeros([STEP], tl.int32)
        if INDEXED:
            count = tl.load(row_count + t, mask=inside, other=0)
            units += tl.cdiv(count, BLOCK_N)
            from_end = (blocks - 1 - t % blocks) * BLOCK  # query rows after this block
            b = t // blocks // HEADS_KV
            valid = tl.minimum(rows - from_end, BLOCK)
            if MASKED:
                valid = tl.load(valid_count + b * blocks + t % blocks, mask=inside, other=0)
            reads = count.to(tl.int64) * valid
            tl.atomic_add(keys_read + b, reads, mask=inside & (w % SPLIT_M == 0))
        tl.store(bounds + w * CLASSES, units, mask=inside)
        units += tl.cdiv(pinned, BLOCK_N)
        tl.store(bounds + w * CLASSES + 1, units, mask=inside)
        seen = tl.zeros([STEP], tl.int32) + suffix
        if CAUSAL:
            seen = tl.maximum(seen - (blocks - 1 - t % blocks) * BLOCK, 0)
        units += tl.cdiv(seen, BLOCK_N)
        tl.store(bounds + w * CLASSES + 2, units, mask=inside)
        for level in tl.static_range(LEVELS):
            units += tl.cdiv(tl.load(dropped_counts[level] + t, mask=inside, other=0), BLOCK_N)
            tl.store(bounds + w * CLASSES + 3 + level, units, mask=inside)
        if CALIBRATED:
            units += tl.cdiv(tl.load(kept_count + t, mask=inside, other=0), BLOCK_N)
            tl.store(bounds + w * CLASSES + 3 + LEVELS, units, mask=inside)
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
def softmax_step(raw, scale, acc, peak, total, v):
    """Add one tile of keys, `raw * scale` their logits in base 2, to a running softmax."""
    top = tl.maximum(peak, tl.max(raw, 1) * scale)
    base = tl.where(top == NEG_INF, 0.0, top)
    p = tl.exp2(raw * scale - base[:, None])
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, top, total


@triton.jit
def attend_rows(
    q, scale, acc, peak, total, keys, values, list_, masses, first, last, count,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    LISTED: tl.constexpr, PARTIAL: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """Units `first:last` of one head's rows: all of them, or those of `list_`.

    With `PARTIAL` the last of the `count` rows may end inside a unit. With `NODES` the rows are
    centroids and mean values, and `masses` says how many keys each stands for.
    """
    dims, lane = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    row = first * BLOCK_N + lane
    mass = tl.full([BLOCK_N], NEG_INF, tl.float32)
    if NODES:
        mass = tl.load(masses + row, mask=row < count, other=NEG_INF)
    if LISTED:
        row = tl.load(list_ + row, mask=row < count, other=0)
    for unit in range(first, last):
        slot = unit * BLOCK_N + lane
        at = row[:, None].to(tl.int64) * DIM + dims
        if PARTIAL or DIM != BLOCK_D:
            inside = (slot < count)[:, None] & (dims < DIM)
            k = tl.load(keys + at, mask=inside, other=0.0)
            v = tl.load(values + at, mask=inside, other=0.0)
        else:
            k, v = tl.load(keys + at), tl.load(values + at)
        raw = tl.dot(q, tl.trans(k), input_precision="ieee")
        if NODES:
            raw += (mass / scale)[None, :]
        elif PARTIAL:
            raw = tl.where((slot < count)[None, :], raw, NEG_INF)
        acc, peak, total = softmax_step(raw, scale, acc, peak, total, v)
        row = slot + BLOCK_N
        if NODES:
            mass = tl.load(masses + row, mask=row < count, other=NEG_INF)
        if LISTED:  # one unit ahead, so that no key waits for its address
            row = tl.load(list_ + row, mask=row < count, other=0)
    return acc, peak, total


@triton.jit
def attend_suffix(
    q, scale, acc, peak, total, keys, k_s, values, v_s, mask, m_q, m_s, row, ok,
    first, last, rows, suffix,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Units `first:last` of the tokens after the context, under their mask."""
    dims = tl.arange(0, BLOCK_D)
    for unit in tl.range(first, last, num_stages=1):  # few: spare shared memory
        slot = unit * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (slot < suffix)[:, None] & (dims < DIM)
        at = slot[:, None].to(tl.int64)
        k = tl.load(keys + at * k_s + dims, mask=inside, other=0.0)
        v = tl.load(values + at * v_s + dims, mask=inside, other=0.0)
        raw = tl.dot(q, tl.trans(k), input_precision="ieee")
        seen = (slot < suffix)[None, :] & ok[:, None]
        if CAUSAL:
            seen = seen & (slot[None, :] <= row[:, None] + (suffix - rows))
        else:
            bit = mask + row[:, None].to(tl.int64) * m_q + slot[None, :] * m_s
            seen = seen & (tl.load(bit, mask=seen, other=0) != 0)
        raw = tl.where(seen, raw, NEG_INF)
        acc, peak, total = softmax_step(raw, scale, acc, peak, total, v)
    return acc, peak, total


@triton.jit
def estimate_kept(q, scale, centroids, list_, masses, first, last, count,
                  DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_N: tl.constexpr):  # fmt: skip
    """First-order log2 mass of the kept leaves of units `first:last`, `[BLOCK_M]`."""
    dims = tl.arange(0, BLOCK_D)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for unit in tl.range(first, last, num_stages=1):
        slot = unit * BLOCK_N + tl.arange(0, BLOCK_N)
        node = tl.load(list_ + slot, mask=slot < count, other=0)
        inside = (slot < count)[:, None] & (dims < DIM)
        c = tl.load(centroids + node[:, None].to(tl.int64) * DIM + dims, mask=inside, other=0.0)
        mass = tl.load(masses + slot, mask=slot < count, other=NEG_INF)
        logits = tl.dot(q, tl.trans(c), input_precision="ieee") * scale + mass[None, :]
        top = tl.maximum(peak, tl.max(logits, 1))
        base = tl.where(top == NEG_INF, 0.0, top)
        total = total * tl.exp2(peak - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        peak = top
    return peak + tl.log2(total)


@triton.jit
def store_part(part, part_lse, slot, acc, peak, total, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
               BLOCK_M: tl.constexpr):  # fmt: skip
    """Normalised output and log2 mass of one stretch."""
    at = slot.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(part + at[:, None] * DIM + dims, acc, mask=(dims < DIM)[None, :])
    tl.store(part_lse + at, peak + tl.log2(total))


@triton.jit
def clip(first, last, start, end):
    """The part of units `first:last` inside `start:end`, counted from `start`."""
    return tl.maximum(first, start) - start, tl.minimum(last, end) - start


@triton.jit
def attention_kernel(
    query, q_b, q_h, q_r, keys, values, tokens, suffix_keys, k_b, k_h, k_s,
    suffix_values, v_b, v_h, v_s, mask, m_b, m_q, m_s,
    ends, bounds, row_list, row_count, centroids, mean_values, nodes, dropped, masses,
    dropped_counts, kept_list, kept_mass, kept_count, part, part_lse, far, far_lse, exact_lse, estimate,
    tiles, blocks, rows, suffix, pinned, capacity, pass_tiles, scale,
    HEADS_KV: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_M: tl.constexpr,
    LEVELS: tl.constexpr, CLASSES: tl.constexpr, CALIBRATED: tl.constexpr, INDEXED: tl.constexpr,
    CAUSAL: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One program's stretches of the line of units, one in every pass."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    dims = tl.arange(0, BLOCK_D)
    for number in range(0, tl.cdiv(tiles * SPLIT_M, pass_tiles)):
        w_start, w_end, begin, stop, _, _ = stretch(
            ends, tiles * SPLIT_M, pass_tiles, number, pid, programs
        )
        w_first = tile_at(ends, w_start, w_end, begin, STEP)
        w_last = tile_at(ends, w_start, w_end, stop - 1, STEP)
        for w in range(w_first, tl.where(begin < stop, w_last + 1, w_first)):
            slot = number * programs + pid + w
            t = w // SPLIT_M
            wide, h, b = (
                t.to(tl.int64),
                ((t // blocks) % HEADS_KV).to(tl.int64),
                t // blocks // HEADS_KV,
            )
            bound = bounds + w * CLASSES
            start = tl.load(ends + w) - tl.load(bound + CLASSES - 1)
            lo, hi = tl.maximum(begin - start, 0), tl.minimum(stop, tl.load(ends + w)) - start
            m = (w % SPLIT_M) * BLOCK_M + tl.arange(0, BLOCK_M)
            row = rows - (blocks - t % blocks) * BLOCK + m % BLOCK
            ok = (m < GROUP * BLOCK) & (row >= 0)
            q_rows = query + b.to(tl.int64) * q_b + (h * GROUP + m // BLOCK)[:, None] * q_h
            q_rows += row[:, None].to(tl.int64) * q_r
            q = tl.load(q_rows + dims, mask=ok[:, None] & (dims < DIM), other=0.0)
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            k_head, v_head = keys + h * tokens * DIM, values + h * tokens * DIM
            kept_end, pinned_end = tl.load(bound), tl.load(bound + 1)
            if INDEXED:
                count = tl.load(row_count + t)
                first, last, whole = lo, tl.minimum(hi, kept_end), count // BLOCK_N
                acc, peak, total = attend_rows(
                    q, scale, acc, peak, total, k_head, v_head, row_list + wide * capacity, row_list,
                    first, tl.minimum(last, whole), count, DIM, BLOCK_D, BLOCK_N, True, False, False,
                )  # fmt: skip
                acc, peak, total = attend_rows(
                    q, scale, acc, peak, total, k_head, v_head, row_list + wide * capacity, row_list,
                    tl.maximum(first, whole), last, count, DIM, BLOCK_D, BLOCK_N, True, True, False,
                )  # fmt: skip
            if CALIBRATED:
                slots = slot.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
                tl.store(exact_lse + slots, peak + tl.log2(total))
            first, last = clip(lo, hi, kept_end, pinned_end)
            acc, peak, total = attend_rows(
                q, scale, acc, peak, total, k_head, v_head, row_list, row_list,
                first, last, pinned, DIM, BLOCK_D, BLOCK_N, False, True, False,
            )  # fmt: skip
            end = tl.load(bound + 2)
            first, last = clip(lo, hi, pinned_end, end)
            acc, peak, total = attend_suffix(
                q, scale, acc, peak, total, suffix_keys + b.to(tl.int64) * k_b + h * k_h, k_s,
                suffix_values + b.to(tl.int64) * v_b + h * v_h, v_s, mask + b.to(tl.int64) * m_b,
                m_q, m_s, row, ok, first, last, rows, suffix, DIM, BLOCK_D, BLOCK_N, CAUSAL,
            )  # fmt: skip
            if CALIBRATED:
                store_part(part, part_lse, slot, acc, peak, total, DIM, BLOCK_D, BLOCK_M)
                acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
                peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
                total = tl.zeros([BLOCK_M], tl.float32)
            for level in tl.static_range(LEVELS):
                head = h * nodes[level]
                start = end
                end = tl.load(bound + 3 + level)
                first, last = clip(lo, hi, start, end)
                acc, peak, total = attend_rows(
                    q, scale, acc, peak, total, centroids[level] + head * DIM,
                    mean_values[level] + head * DIM, dropped[level] + wide * nodes[level],
                    masses[level] + wide * nodes[level], first, last,
                    tl.load(dropped_counts[level] + t), DIM, BLOCK_D, BLOCK_N, True, False, True,
                )  # fmt: skip
            if CALIBRATED:
                store_part(far, far_lse, slot, acc, peak, total, DIM, BLOCK_D, BLOCK_M)
                first, last = clip(lo, hi, end, tl.load(bound + 3 + LEVELS))
                head = h * nodes[LEVELS - 1]
                lse = estimate_kept(
                    q, scale, centroids[LEVELS - 1] + head * DIM,
                    kept_list + wide * nodes[LEVELS - 1], kept_mass + wide * nodes[LEVELS - 1], first, last, tl.load(kept_count + t),
                    DIM, BLOCK_D, BLOCK_M, BLOCK_N,
                )  # fmt: skip
                slots = slot.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
                tl.store(estimate + slots, lse)
            else:
                store_part(part, part_lse, slot, acc, peak, total, DIM, BLOCK_D, BLOCK_M)


@triton.jit
def calibration(exact_lse, estimate, m, p_first, p_last, slot, clamp, BLOCK_M: tl.constexpr,
                BLOCK_R: tl.constexpr):  # fmt: skip
    """log2 of exact over estimated mass of the kept leaves, `[BLOCK_R]`; 0 where nothing is kept."""
    exact = tl.full([BLOCK_R], float("-inf"), tl.float32)
    guess = tl.full([BLOCK_R], float("-inf"), tl.float32)
    for p in range(p_first, p_last + 1):
        at = (slot + p).to(tl.int64) * BLOCK_M + m
        exact = log_add(exact, tl.load(exact_lse + at))
        guess = log_add(guess, tl.load(estimate + at))
    known = (exact > NEG_INF) & (guess > NEG_INF)
    gap = tl.where(known, exact, 0.0) - tl.where(known, guess, 0.0)
    return tl.minimum(tl.maximum(gap, -clamp), clamp)


@triton.jit
def log_add(a, b):
    """log2 of 2^a + 2^b, `-inf` allowed."""
    top = tl.maximum(a, b)
    base = tl.where(top == NEG_INF, 0.0, top)
    return base + tl.log2(tl.exp2(a - base) + tl.exp2(b - base))


@triton.jit
def merge_part(out, lse, part, part_lse, at, gap, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Add one stretch, its mass shifted by `gap`, to a running output and log2 mass."""
    dims = tl.arange(0, BLOCK_D)
    more = tl.load(part_lse + at) + gap
    value = tl.load(part + at[:, None] * DIM + dims, mask=(dims < DIM)[None, :], other=0.0)
    top = tl.maximum(lse, more)
    base = tl.where(top == NEG_INF, 0.0, top)
    a, b = tl.exp2(lse - base), tl.exp2(more - base)
    mass = tl.where(a + b > 0, a + b, 1.0)
    return out * (a / mass)[:, None] + value * (b / mass)[:, None], base + tl.log2(a + b)


@triton.jit
def combine_kernel(
    output, ends, bounds, part, part_lse, far, far_lse, exact_lse, estimate,
    tiles, blocks, rows, programs, pass_tiles, clamp,
    HEADS_KV: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT_M: tl.constexpr,
    CLASSES: tl.constexpr, CALIBRATED: tl.constexpr,
):  # fmt: skip
    """Merge all stretches of `BLOCK_R` rows of one tile into the output `[B, Hq, Q, D]`."""
    w, m = tl.program_id(0), tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    number = w // pass_tiles
    _, _, _, _, base, share = stretch(ends, tiles * SPLIT_M, pass_tiles, number, 0, programs)
    end = tl.load(ends + w)
    start = end - tl.load(bounds + w * CLASSES + CLASSES - 1)
    p_first, p_last = (start - base) // share, (end - 1 - base) // share
    p_last = tl.where(end > start, p_last, p_first - 1)
    out = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    lse = tl.full([BLOCK_R], float("-inf"), tl.float32)
    gap = tl.zeros([BLOCK_R], tl.float32)
    if CALIBRATED:
        gap = calibration(
            exact_lse, estimate, m, p_first, p_last, number * programs + w, clamp, BLOCK_M, BLOCK_R
        )
    for p in range(p_first, p_last + 1):
        at = (number * programs + p + w).to(tl.int64) * BLOCK_M + m
        out, lse = merge_part(out, lse, part, part_lse, at, 0.0, DIM, BLOCK_D)
        if CALIBRATED:
            out, lse = merge_part(out, lse, far, far_lse, at, gap, DIM, BLOCK_D)
    t, member = w // SPLIT_M, (w % SPLIT_M) * BLOCK_M + m
    head = (t // blocks) % HEADS_KV * GROUP + member // BLOCK
    row = rows - (blocks - t % blocks) * BLOCK + member % BLOCK
    ok = (member < GROUP * BLOCK) & (row >= 0)
    dims = tl.arange(0, BLOCK_D)
    line = (t // blocks // HEADS_KV * (HEADS_KV * GROUP) + head).to(tl.int64) * rows + row
    ok = ok[:, None] & (dims < DIM)
    tl.store(output + line[:, None] * DIM + dims, out.to(output.dtype.element_ty), mask=ok)
