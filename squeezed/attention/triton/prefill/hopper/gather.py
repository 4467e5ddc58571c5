"""The role of the Hopper attention that copies keys and values into the ring."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from squeezed.attention.triton.prefill.hopper.stretch import ROLE, class_part, stretch, tile_part


@gluon.jit
def rows_of(
    list_, unit, first, count, BLOCK_N: gl.constexpr, LISTED: gl.constexpr, lane: gl.constexpr
):
    """Row numbers of a unit, those beyond `count` and of units before `first` being any."""
    row = gl.maximum(unit, first) * BLOCK_N + gl.arange(0, BLOCK_N, lane)
    inside = row < count
    if LISTED:
        return gl.load(list_ + row, mask=inside, other=0)
    else:
        return gl.where(inside, row, 0)


@gluon.jit
def fetch(place, base, row, row_stride, DIM: gl.constexpr, gather: gl.constexpr):
    """Start to copy rows of `DIM` numbers to shared memory."""
    dims = gl.arange(0, DIM, gl.SliceLayout(0, gather))
    source = base + row[:, None].to(gl.int64) * row_stride + dims[None, :]
    async_copy.async_copy_global_to_shared(place, source)


@gluon.jit
def fetch_line(place, line, unit, count, BLOCK_N: gl.constexpr):
    """Start to copy one number per node of a unit."""
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [ROLE], [0])
    at = unit * BLOCK_N + gl.arange(0, BLOCK_N, flat)
    async_copy.async_copy_global_to_shared(place, line + at, mask=at < count)


@gluon.jit
def gather_class(
    step,
    keys,
    key_stride,
    values,
    value_stride,
    list_,
    log_sizes,
    variances,
    count,
    first,
    last,
    rings,
    DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    LISTED: gl.constexpr,
    FAR: gl.constexpr,
    DIPOLE: gl.constexpr,
):
    """Feed the rows of units `last - 1` to `first` to the ring; returns the next step."""
    k_ring, v_ring, size_ring, variance_ring, full, empty = rings
    gather: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [ROLE, 1], [1, 0])
    lane: gl.constexpr = gl.SliceLayout(1, gather)
    if first < last:
        for i in range(0, last - first + 1):
            slot, turn = (step + i) % STAGES, (step + i) // STAGES
            row = rows_of(list_, last - 1 - i, first, count, BLOCK_N, LISTED, lane)
            older = rows_of(list_, last - i, first, count, BLOCK_N, LISTED, lane)
            mbarrier.wait(empty.index(slot), (turn & 1) ^ 1)
            if i < last - first:
                fetch(k_ring.index(slot).slice(0, BLOCK_N), keys, row, key_stride, DIM, gather)
                if FAR:
                    fetch_line(size_ring.index(slot), log_sizes, last - 1 - i, count, BLOCK_N)
                if DIPOLE:
                    fetch_line(variance_ring.index(slot), variances, last - 1 - i, count, BLOCK_N)
            if i > 0:
                place = v_ring.index(slot).slice(0, BLOCK_N)
                fetch(place, values, older, value_stride, DIM, gather)
            async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
        step += last - first + 1
    return step


@gluon.jit
def gatherer(
    context,
    tokens,
    suffix_keys,
    suffix_values,
    plan,
    kept,
    levels,
    far,
    spans,
    blocks,
    suffix,
    capacity,
    pass_tiles,
    rings,
    HEADS_KV: gl.constexpr,
    DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
    OTHER_N: gl.constexpr,
    SPLIT_M: gl.constexpr,
    STAGES: gl.constexpr,
    LEVELS: gl.constexpr,
    CLASSES: gl.constexpr,
    DIPOLE: gl.constexpr,
    STEP: gl.constexpr,
):
    """The warps that copy: every class of every tile, in the order in which it is attended to."""
    keys, values = context  # [Hkv, P, D] each
    recent_keys, key_batch_stride, key_head_stride, key_stride = suffix_keys  # [B, Hkv, S, D]
    recent_values, value_batch_stride, value_head_stride, value_stride = suffix_values
    ends, bounds = plan  # [W], [W, CLASSES]
    row_list, row_count = kept  # [T, capacity], [T]
    centroids, mean_values, nodes = levels  # of every level [Hkv, C, D] twice, C
    dropped, log_sizes, variances, dropped_counts = far  # of every level [T, C] three times, [T]
    step = gl.to_tensor(0)
    for number in range(0, gl.cdiv(spans, pass_tiles)):
        w_first, w_stop, begin, end = stretch(ends, spans, pass_tiles, number, STEP)
        for w in range(w_first, w_stop):
            t = w // SPLIT_M
            wide = t.to(gl.int64)
            h = ((t // blocks) % HEADS_KV).to(gl.int64)
            b = (t // blocks // HEADS_KV).to(gl.int64)
            lo, hi = tile_part(ends, bounds, w, begin, end, CLASSES)
            class_end = gl.load(bounds + w * CLASSES)
            first, last = class_part(lo, hi, 0, class_end)
            step = gather_class(
                step,
                keys + h * tokens * DIM,
                DIM,
                values + h * tokens * DIM,
                DIM,
                row_list + wide * capacity,
                ends,
                ends,
                gl.load(row_count + t),
                first,
                last,
                rings,
                DIM,
                BLOCK_N,
                STAGES,
                True,
                False,
                False,
            )
            start = class_end
            class_end = gl.load(bounds + w * CLASSES + 1)
            first, last = class_part(lo, hi, start, class_end)
            step = gather_class(
                step,
                recent_keys + b * key_batch_stride + h * key_head_stride,
                key_stride,
                recent_values + b * value_batch_stride + h * value_head_stride,
                value_stride,
                row_list,
                ends,
                ends,
                suffix,
                first,
                last,
                rings,
                DIM,
                OTHER_N,
                STAGES,
                False,
                False,
                False,
            )
            for level in gl.static_range(LEVELS):
                head, line = h * nodes[level] * DIM, wide * nodes[level]
                start = class_end
                class_end = gl.load(bounds + w * CLASSES + 2 + level)
                first, last = class_part(lo, hi, start, class_end)
                step = gather_class(
                    step,
                    centroids[level] + head,
                    DIM,
                    mean_values[level] + head,
                    DIM,
                    dropped[level] + line,
                    log_sizes[level] + line,
                    variances[level] + line,
                    gl.load(dropped_counts[level] + t),
                    first,
                    last,
                    rings,
                    DIM,
                    OTHER_N,
                    STAGES,
                    True,
                    True,
                    DIPOLE,
                )
