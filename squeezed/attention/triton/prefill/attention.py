"""Attention of query blocks to lists of rows, on tensor cores; `prefill_plan` shares the work."""

from __future__ import annotations

import triton
import triton.language as tl

from squeezed.attention.triton.prefill.classes import attend_nodes, attend_rows, attend_suffix
from squeezed.attention.triton.prefill.coded import attend_coded_rows
from squeezed.attention.triton.prefill.normaliser import LOG2E, query_energy
from squeezed.attention.triton.prefill.plan import LENGTHS, stretch, tile_at


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
    coding,
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
    BITS: tl.constexpr,
    PART: tl.constexpr,
    PTX: tl.constexpr,
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
            if BITS:
                acc, peak, mass = attend_coded_rows(
                    q,
                    scale,
                    acc,
                    peak,
                    mass,
                    (k_head, v_head),
                    coding,
                    h,
                    rows_here,
                    first,
                    last,
                    count,
                    DIM,
                    BLOCK_D,
                    BLOCK_N,
                    PART,
                    BITS,
                    PTX,
                )
            else:
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
