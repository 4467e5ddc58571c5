"""The kernel that ends a decode step: partial sums -> output."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from squeezed.attention.triton.decode.softmax import LOG2_E, problem
from squeezed.attention.triton.decode.stream import at, stream
from squeezed.attention.triton.decode.turning import load_turn


@triton.jit
def merge(
    partials,
    turned_sums,
    moved,
    near,
    near_slots,
    fixed,
    fixed_slots,
    row,
    d,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DIMS: tl.constexpr,
    CODED: tl.constexpr,
    DIPOLE: tl.constexpr,
):
    """Peak, mass, weighted values and variances of two runs of partial sums, merged.

    They are walked as one, so that all loads of a row travel together. CODED: the nearer ones have
    turned sums of all dimensions besides.
    """
    sums, peaks, masses = partials  # [slots, ROWS, D], [slots, ROWS] twice
    peak, mass, moved_sum = float("-inf"), 0.0, 0.0
    value = tl.zeros([DIMS], tl.float32)
    e, turned = tl.arange(0, D_PAD), tl.zeros([D_PAD], tl.float32)
    for start in range(0, near_slots + fixed_slots, SLOTS):
        index = start + tl.arange(0, SLOTS)
        inside = index < near_slots + fixed_slots
        slot = tl.where(index < near_slots, near + index, fixed + index - near_slots)
        place = slot.to(tl.int64) * ROWS + row
        mask = inside[:, None] & (d < D)[None, :]
        part = tl.load(sums + place[:, None] * D + d[None, :], mask=mask, other=0.0)
        part_peak = tl.load(peaks + place, mask=inside, other=float("-inf"))
        part_mass = tl.load(masses + place, mask=inside, other=0.0)
        new = tl.maximum(peak, tl.max(part_peak))
        safe = tl.where(new == float("-inf"), 0.0, new)
        weight, decay = tl.exp2(part_peak - safe), tl.exp2(peak - safe)
        mass = mass * decay + tl.sum(weight * part_mass)
        value = value * decay + tl.sum(weight[:, None] * part, 0)
        if CODED:
            mask = (index < near_slots)[:, None] & (e < D)[None, :]
            part = tl.load(turned_sums + place[:, None] * D + e[None, :], mask=mask, other=0.0)
            turned = turned * decay + tl.sum(weight[:, None] * part, 0)
        if DIPOLE:
            part_moved = tl.load(moved + place, mask=index < near_slots, other=0.0)
            moved_sum = moved_sum * decay + tl.sum(weight * part_moved)
        peak = new
    return peak, mass, value, turned, moved_sum


@triton.jit
def shift_of(query, slope, head, d, scale, D: tl.constexpr, D_PAD: tl.constexpr):
    """How far one query `[D]` moves dimensions `d` of a value, for a variance of 1."""
    e = tl.arange(0, D_PAD)
    q = tl.load(query + e, mask=e < D, other=0.0).to(tl.float32)
    rows = slope + head.to(tl.int64) * D * D + d[:, None] * D + e[None, :]
    matrix = tl.load(rows, mask=(d < D)[:, None] & (e < D)[None, :], other=0.0)
    return scale * tl.sum(matrix.to(tl.float32) * q[None, :], 1)


@triton.jit
def combine_kernel(
    query,
    slope,
    output,
    log_mass,
    keys_read,
    valid,
    counters,
    read_counts,
    partials,
    turning,
    moved,
    batch,
    problems,
    programs,
    fixed,
    scale_bits,
    GROUP: tl.constexpr,
    TILE_BATCH: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DIMS: tl.constexpr,
    Z_PAD: tl.constexpr,
    SLOTS: tl.constexpr,
    CLUSTERED: tl.constexpr,
    PADDED: tl.constexpr,
    CODED: tl.constexpr,
    DIPOLE: tl.constexpr,
    NODE_UNIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid `(problems, ROWS, dimensions / DIMS)`; a program writes a part of one output row."""
    queries, query_batch_stride, query_head_stride = query  # [B, Hq, 1, D]
    outputs, output_batch_stride = output  # [B, Hq, 1, D]
    value_turn, turned_sums = turning  # [Hkv, D, D], [slots, ROWS, D]
    fixed_base, fixed_slots = fixed
    z, row, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head, tile = problem(z, TILES)
    request = tile * TILE_BATCH + row // GROUP
    d = share * DIMS + tl.arange(0, DIMS)
    near, near_slots, shift = 0, 0, tl.zeros([DIMS], tl.float32)
    if DIPOLE:
        line = tl.minimum(request, batch - 1).to(tl.int64) * query_batch_stride
        line += (head * GROUP + row % GROUP) * query_head_stride
        shift = shift_of(queries + line, slope, head, d, scale_bits / LOG2_E, D, D_PAD)
    if CODED:
        turn = load_turn(value_turn, head, d, D, D_PAD)
    if CLUSTERED:  # the kernel before starts this one only when the lists are complete
        _runs, _dropped, _near, begin, end = stream(counters, problems, Z_PAD, NODE_UNIT)
        units = tl.cdiv(tl.max(end), programs)  # of a program of `attend_kernel`
        near = at(begin, z, Z_PAD) // units + z
        near_slots = (at(end, z, Z_PAD) - 1) // units + z - near + 1
        if (request < batch) & (row % GROUP == 0) & (share == 0):
            count = read_counts + z * TILE_BATCH + row // GROUP
            read = tl.load(count, cache_modifier=".cg").to(tl.int64)
            tl.atomic_add(keys_read + request, read, sem="relaxed")
    if PDL:
        gdc_wait()
    if request < batch:
        peak, mass, value, turned, variances = merge(
            partials,
            turned_sums,
            moved,
            near,
            near_slots,
            fixed_base + z * fixed_slots,
            fixed_slots,
            row,
            d,
            SLOTS,
            ROWS,
            D,
            D_PAD,
            DIMS,
            CODED,
            DIPOLE,
        )
        if CODED:
            value += tl.sum(turned[:, None] * turn.to(tl.float32), 0)
        if PADDED:
            real, real_stride = valid  # [B, 1]
            mass = tl.where(tl.load(real + request.to(tl.int64) * real_stride) != 0, mass, 0.0)
        value += variances * shift
        value = tl.where(mass == 0, 0.0, value / mass)  # padding attends to nothing; NaN shows
        place = request.to(tl.int64) * output_batch_stride + (head * GROUP + row % GROUP) * D
        if share == 0:
            nats = tl.where(mass == 0, float("-inf"), (peak + tl.log2(mass)) / LOG2_E)
            tl.store(log_mass + place // D, nats)
        tl.store(outputs + place + d, value.to(outputs.dtype.element_ty), mask=d < D)
