"""The role of the Hopper attention that copies keys and values into the ring."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from squeezed.attention.triton.prefill.hopper.stretch import ROLE, class_part, stretch, tile_part


@gluon.jit
def rows_of(list_, unit, first, count, BLOCK_N: gl.constexpr, LISTED: gl.constexpr,
            lane: gl.constexpr):  # fmt: skip
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
    step, keys, k_s, values, v_s, list_, masses, variances, count, first, last,
    k_ring, v_ring, mass_ring, variance_ring, full, empty,
    DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, LISTED: gl.constexpr,
    MASSIVE: gl.constexpr, DIPOLE: gl.constexpr,
):  # fmt: skip
    """Feed the rows of units `last - 1` to `first` to the ring; returns the next step."""
    gather: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [ROLE, 1], [1, 0])
    lane: gl.constexpr = gl.SliceLayout(1, gather)
    if first < last:
        for i in range(0, last - first + 1):
            slot, turn = (step + i) % STAGES, (step + i) // STAGES
            row = rows_of(list_, last - 1 - i, first, count, BLOCK_N, LISTED, lane)
            older = rows_of(list_, last - i, first, count, BLOCK_N, LISTED, lane)
            mbarrier.wait(empty.index(slot), (turn & 1) ^ 1)
            if i < last - first:
                fetch(k_ring.index(slot).slice(0, BLOCK_N), keys, row, k_s, DIM, gather)
                if MASSIVE:
                    fetch_line(mass_ring.index(slot), masses, last - 1 - i, count, BLOCK_N)
                if DIPOLE:
                    fetch_line(variance_ring.index(slot), variances, last - 1 - i, count, BLOCK_N)
            if i > 0:
                fetch(v_ring.index(slot).slice(0, BLOCK_N), values, older, v_s, DIM, gather)
            async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
        step += last - first + 1
    return step


@gluon.jit
def gatherer(
    keys, values, tokens, suffix_keys, k_b, k_h, k_s, suffix_values, v_b, v_h, v_s,
    ends, bounds, row_list, row_count, centroids, mean_values, nodes, dropped, masses, variances,
    dropped_counts, spans, blocks, suffix, capacity, pass_tiles,
    k_ring, v_ring, mass_ring, variance_ring, full, empty,
    HEADS_KV: gl.constexpr, DIM: gl.constexpr, BLOCK_N: gl.constexpr, OTHER_N: gl.constexpr,
    SPLIT_M: gl.constexpr, STAGES: gl.constexpr, LEVELS: gl.constexpr, CLASSES: gl.constexpr,
    DIPOLE: gl.constexpr, STEP: gl.constexpr,
):  # fmt: skip
    """The warps that copy: every class of every tile, in the order in which it is attended to."""
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
                step, keys + h * tokens * DIM, DIM, values + h * tokens * DIM, DIM,
                row_list + wide * capacity, ends, ends, gl.load(row_count + t), first, last,
                k_ring, v_ring, mass_ring, variance_ring, full, empty,
                DIM, BLOCK_N, STAGES, True, False, False,
            )  # fmt: skip
            start = class_end
            class_end = gl.load(bounds + w * CLASSES + 1)
            first, last = class_part(lo, hi, start, class_end)
            step = gather_class(
                step, suffix_keys + b * k_b + h * k_h, k_s, suffix_values + b * v_b + h * v_h, v_s,
                row_list, ends, ends, suffix, first, last,
                k_ring, v_ring, mass_ring, variance_ring, full, empty,
                DIM, OTHER_N, STAGES, False, False, False,
            )  # fmt: skip
            for level in gl.static_range(LEVELS):
                head, line = h * nodes[level] * DIM, wide * nodes[level]
                start = class_end
                class_end = gl.load(bounds + w * CLASSES + 2 + level)
                first, last = class_part(lo, hi, start, class_end)
                step = gather_class(
                    step, centroids[level] + head, DIM, mean_values[level] + head, DIM,
                    dropped[level] + line, masses[level] + line, variances[level] + line,
                    gl.load(dropped_counts[level] + t), first, last,
                    k_ring, v_ring, mass_ring, variance_ring, full, empty,
                    DIM, OTHER_N, STAGES, True, True, DIPOLE,
                )  # fmt: skip
