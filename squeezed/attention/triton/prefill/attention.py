"""Attention of query blocks to lists of rows, on tensor cores; `prefill_plan` shares the work."""

from __future__ import annotations

import triton
import triton.language as tl

from squeezed.attention.triton.prefill.plan import LENGTHS, stretch, tile_at
from squeezed.attention.triton.prefill.select import LOG2E, query_energy

NEG_INF: tl.constexpr = tl.constexpr(float("-inf"))


@triton.jit
def softmax_step(raw, scale, acc, peak, mass, v):
    """Add one tile of keys, `raw * scale` their logits in base 2, to a running softmax.

    Returns with it the tile's weights, and by how much older weights have shrunk.
    """
    top = tl.maximum(peak, tl.max(raw, 1) * scale)
    base = tl.where(top == NEG_INF, 0.0, top)
    p = tl.exp2(raw * scale - base[:, None])
    shrink = tl.exp2(peak - base)
    mass = mass * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, top, mass, p, shrink


@triton.jit
def attend_rows(
    q,
    scale,
    acc,
    peak,
    mass,
    keys,
    values,
    list_,
    first,
    last,
    count,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """Units `first:last` of the rows of one head in `list_`.

    With `PARTIAL` the last of the `count` rows may end inside a unit.
    """
    dims, lane = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    row = first * BLOCK_N + lane
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
        if PARTIAL:
            raw = tl.where((slot < count)[None, :], raw, NEG_INF)
        acc, peak, mass, _, _ = softmax_step(raw, scale, acc, peak, mass, v)
        row = slot + BLOCK_N  # one unit ahead, so that no key waits for its address
        row = tl.load(list_ + row, mask=row < count, other=0)
    return acc, peak, mass


@triton.jit
def attend_nodes(
    q,
    scale,
    acc,
    peak,
    mass,
    moved,
    energy,
    centroids,
    means,
    list_,
    log_sizes,
    variances,
    first,
    last,
    count,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIPOLE: tl.constexpr,
):
    """Units `first:last` of one level's dropped nodes; `log_sizes`: how many keys each stands for.

    If DIPOLE, `moved` sums their `variances` with the weights of the softmax, `[BLOCK_M]`.
    """
    dims, lane = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    slot = first * BLOCK_N + lane
    log_size = tl.load(log_sizes + slot, mask=slot < count, other=NEG_INF)
    node = tl.load(list_ + slot, mask=slot < count, other=0)
    variance = log_size
    if DIPOLE:
        variance = tl.load(variances + slot, mask=slot < count, other=0.0)
    for unit in range(first, last):
        at = node[:, None].to(tl.int64) * DIM + dims
        inside = (dims < DIM)[None, :]
        k = tl.load(centroids + at, mask=inside, other=0.0)
        v = tl.load(means + at, mask=inside, other=0.0)
        raw = tl.dot(q, tl.trans(k), input_precision="ieee") + (log_size / scale)[None, :]
        if DIPOLE:
            raw += (energy / scale)[:, None] * variance[None, :]
        acc, peak, mass, weights, shrink = softmax_step(raw, scale, acc, peak, mass, v)
        if DIPOLE:
            moved = moved * shrink + tl.sum(weights * variance[None, :], 1)
        slot = (unit + 1) * BLOCK_N + lane  # one unit ahead, so that no key waits for its address
        log_size = tl.load(log_sizes + slot, mask=slot < count, other=NEG_INF)
        node = tl.load(list_ + slot, mask=slot < count, other=0)
        if DIPOLE:
            variance = tl.load(variances + slot, mask=slot < count, other=0.0)
    return acc, peak, mass, moved


@triton.jit
def attend_suffix(
    q,
    scale,
    acc,
    peak,
    mass,
    keys,
    key_stride,
    values,
    value_stride,
    mask,
    mask_row_stride,
    mask_step,
    row,
    ok,
    first,
    last,
    rows,
    suffix,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Units `first:last` of the tokens after the context, under their mask."""
    dims = tl.arange(0, BLOCK_D)
    for unit in tl.range(first, last, num_stages=1):  # few: spare shared memory
        slot = unit * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (slot < suffix)[:, None] & (dims < DIM)
        at = slot[:, None].to(tl.int64)
        k = tl.load(keys + at * key_stride + dims, mask=inside, other=0.0)
        v = tl.load(values + at * value_stride + dims, mask=inside, other=0.0)
        raw = tl.dot(q, tl.trans(k), input_precision="ieee")
        seen = (slot < suffix)[None, :] & ok[:, None]
        if CAUSAL:
            seen = seen & (slot[None, :] <= row[:, None] + (suffix - rows))
        else:
            bit = mask + row[:, None].to(tl.int64) * mask_row_stride + slot[None, :] * mask_step
            seen = seen & (tl.load(bit, mask=seen, other=0) != 0)
        raw = tl.where(seen, raw, NEG_INF)
        acc, peak, mass, _, _ = softmax_step(raw, scale, acc, peak, mass, v)
    return acc, peak, mass


@triton.jit
def store_part(
    partials, slot, acc, peak, mass, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Normalised output and log2 mass of one stretch."""
    outputs, log_masses, _ = partials  # [slots, BLOCK_M, DIM], [slots, BLOCK_M]
    at = slot.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    acc = acc / tl.where(mass > 0, mass, 1.0)[:, None]
    tl.store(outputs + at[:, None] * DIM + dims, acc, mask=(dims < DIM)[None, :])
    tl.store(log_masses + at, peak + tl.log2(mass))


@triton.jit
def clip(first, last, start, end):
    """The part of units `first:last` inside `start:end`, counted from `start`."""
    return tl.maximum(first, start) - start, tl.minimum(last, end) - start


@triton.jit(do_not_specialize=LENGTHS)
def attention_kernel(
    query,
    context,
    tokens,
    suffix_keys,
    suffix_values,
    mask,
    mask_batch_stride,
    mask_row_stride,
    mask_step,
    plan,
    kept,
    levels,
    far,
    far_alpha,
    partials,
    tiles,
    blocks,
    rows,
    suffix,
    capacity,
    pass_tiles,
    scale,
    HEADS_KV: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_M: tl.constexpr,
    LEVELS: tl.constexpr,
    CLASSES: tl.constexpr,
    DIPOLE: tl.constexpr,
    CAUSAL: tl.constexpr,
    STEP: tl.constexpr,
):
    """One program's stretches of the line of units, one in every pass."""
    queries, query_batch_stride, query_head_stride, query_row_stride = query  # [B, Hq, Q, D]
    keys, values = context  # [Hkv, P, D] each
    recent_keys, key_batch_stride, key_head_stride, key_stride = suffix_keys  # [B, Hkv, S, D]
    recent_values, value_batch_stride, value_head_stride, value_stride = suffix_values
    ends, bounds = plan  # [W], [W, CLASSES]
    row_list, row_count = kept  # [T, capacity], [T]
    centroids, mean_values, nodes = levels  # of every level [Hkv, C, D] twice, C
    dropped, log_sizes, variances, dropped_counts = far  # of every level [T, C] three times, [T]
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
            q_rows = queries + b.to(tl.int64) * query_batch_stride
            q_rows += (h * GROUP + m // BLOCK)[:, None] * query_head_stride
            q_rows += row[:, None].to(tl.int64) * query_row_stride
            q = tl.load(q_rows + dims, mask=ok[:, None] & (dims < DIM), other=0.0)
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
            mass = tl.zeros([BLOCK_M], tl.float32)
            k_head, v_head = keys + h * tokens * DIM, values + h * tokens * DIM
            count, rows_end = tl.load(row_count + t), tl.load(bound)
            first, last, whole = lo, tl.minimum(hi, rows_end), count // BLOCK_N
            rows_here = row_list + wide * capacity
            acc, peak, mass = attend_rows(
                q,
                scale,
                acc,
                peak,
                mass,
                k_head,
                v_head,
                rows_here,
                first,
                tl.minimum(last, whole),
                count,
                DIM,
                BLOCK_D,
                BLOCK_N,
                False,
            )
            acc, peak, mass = attend_rows(
                q,
                scale,
                acc,
                peak,
                mass,
                k_head,
                v_head,
                rows_here,
                tl.maximum(first, whole),
                last,
                count,
                DIM,
                BLOCK_D,
                BLOCK_N,
                True,
            )
            end = tl.load(bound + 1)
            first, last = clip(lo, hi, rows_end, end)
            acc, peak, mass = attend_suffix(
                q,
                scale,
                acc,
                peak,
                mass,
                recent_keys + b.to(tl.int64) * key_batch_stride + h * key_head_stride,
                key_stride,
                recent_values + b.to(tl.int64) * value_batch_stride + h * value_head_stride,
                value_stride,
                mask + b.to(tl.int64) * mask_batch_stride,
                mask_row_stride,
                mask_step,
                row,
                ok,
                first,
                last,
                rows,
                suffix,
                DIM,
                BLOCK_D,
                BLOCK_N,
                CAUSAL,
            )
            moved = tl.zeros([BLOCK_M], tl.float32)
            energy = moved
            if DIPOLE:
                weight = tl.load(far_alpha + h * GROUP + m // BLOCK, mask=ok, other=0.0)
                energy = query_energy(q, weight, scale / LOG2E) * LOG2E
            for level in tl.static_range(LEVELS):
                head, line = h * nodes[level], wide * nodes[level]
                start = end
                end = tl.load(bound + 2 + level)
                first, last = clip(lo, hi, start, end)
                acc, peak, mass, moved = attend_nodes(
                    q,
                    scale,
                    acc,
                    peak,
                    mass,
                    moved,
                    energy,
                    centroids[level] + head * DIM,
                    mean_values[level] + head * DIM,
                    dropped[level] + line,
                    log_sizes[level] + line,
                    variances[level] + line,
                    first,
                    last,
                    tl.load(dropped_counts[level] + t),
                    DIM,
                    BLOCK_D,
                    BLOCK_N,
                    DIPOLE,
                )
            if DIPOLE:
                slots = slot.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
                tl.store(partials[2] + slots, moved / tl.where(mass > 0, mass, 1.0))
            store_part(partials, slot, acc, peak, mass, DIM, BLOCK_D, BLOCK_M)
