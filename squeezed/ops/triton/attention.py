"""Kernels of the second half of a decode step: kept rows -> partial sums -> output.

The kept rows of all problems form one stream of tiles that is cut into equal parts, one per
program. A head that keeps many keys therefore takes many programs and holds nobody up. A program
leaves one partial sum per problem it touches, in slot `program + z`: unique, because along the
stream either the program or the problem moves on.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from squeezed.ops.triton.tile import fold, load_query, load_rows, problem, store_partial


@triton.jit
def stream(counters, problems, stride, TILE: tl.constexpr, Z_PAD: tl.constexpr):
    """Kept rows of every problem, and where its tiles begin and end in the stream, `[Z_PAD]`."""
    z = tl.arange(0, Z_PAD)
    rows = tl.load(counters + z * stride, mask=z < problems, other=0)
    tiles = tl.where(z < problems, tl.maximum(tl.cdiv(rows, TILE), 1), 0)
    end = tl.cumsum(tiles, 0)
    return rows, end - tiles, end


@triton.jit
def at(values, index, Z_PAD: tl.constexpr):
    """Element `index` of a vector held in registers."""
    return tl.sum(tl.where(tl.arange(0, Z_PAD) == index, values, 0))


@triton.jit
def attend_kernel(
    query, keys, values, kept_rows, kept_bits, counters, sums, highs, masses,
    query_stride_batch, query_stride_head, batch, problems, context_tokens, capacity,
    counter_stride, scale_bits,
    GROUP: tl.constexpr, TILE_BATCH: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr,
    Z_PAD: tl.constexpr, SHARED: tl.constexpr, PDL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Exact attention of every problem over its list of kept rows; grid `(programs,)`."""
    program = tl.program_id(0)
    row = tl.arange(0, M)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    length, begin, end = stream(counters, problems, counter_stride, TILE, Z_PAD)
    total = tl.max(end)
    share = tl.cdiv(total, tl.num_programs(0))
    cursor = program * share
    stop = tl.minimum(total, cursor + share)
    while cursor < stop:
        z = tl.sum((end <= cursor).to(tl.int32) * (tl.arange(0, Z_PAD) < problems))
        first = at(begin, z, Z_PAD)
        last = tl.minimum(stop, at(end, z, Z_PAD))
        count = at(length, z, Z_PAD)
        head, tile = problem(z, TILES)
        q, exists = load_query(
            query, query_stride_batch, query_stride_head, head, tile, row, batch,
            GROUP, TILE_BATCH, D, D_PAD,
        )  # fmt: skip
        context = head.to(tl.int64) * context_tokens * D
        high = tl.full([M], float("-inf"), tl.float32)
        mass = tl.zeros([M], tl.float32)
        sum_ = tl.zeros([M, D_PAD], tl.float32)
        for step in tl.range(cursor - first, last - first, num_stages=STAGES):
            position = step * TILE + tl.arange(0, TILE)
            live = position < count
            entry = z.to(tl.int64) * capacity + position
            kept = tl.load(kept_rows + entry, mask=live, other=0)  # row 0 stands for the padding
            everywhere = tl.full([TILE], True, tl.int1)
            key = load_rows(keys + context, kept, everywhere, D, D, D_PAD)
            value = load_rows(values + context, kept, everywhere, D, D, D_PAD)
            logits = tl.dot(q, tl.trans(key)) * scale_bits
            attended = live[None, :]
            if SHARED:
                wanted = tl.load(kept_bits + entry, mask=live, other=0)
                attended = ((wanted[None, :] >> (row // GROUP)[:, None]) & 1) != 0
            logits = tl.where(attended, logits, float("-inf"))
            high, mass, sum_ = fold(high, mass, sum_, logits, value)
        store_partial(
            sums, highs, masses, program + z, row, exists & (row < ROWS), high, mass, sum_,
            ROWS, D, D_PAD,
        )  # fmt: skip
        cursor = last


@triton.jit
def merge_mass(highs, masses, first, count, row, SLOTS: tl.constexpr, ROWS: tl.constexpr):
    """Log-sum-exp of a run of partial sums, in bits; `-inf` if empty."""
    high, mass = float("-inf"), 0.0
    for start in range(0, count, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        at_ = (first + slot).to(tl.int64) * ROWS + row
        part_high = tl.load(highs + at_, mask=slot < count, other=float("-inf"))
        part_mass = tl.load(masses + at_, mask=slot < count, other=0.0)
        top = tl.maximum(high, tl.max(part_high))
        safe = tl.where(top == float("-inf"), 0.0, top)
        mass = mass * tl.exp2(high - safe) + tl.sum(part_mass * tl.exp2(part_high - safe))
        high = top
    return high + tl.log2(mass)


@triton.jit
def calibration(
    highs, masses, kept, kept_slots, estimate_highs, estimate_masses, estimate, estimate_slots,
    row, clamp_bits, SLOTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """How far the kept clusters' exact log mass lies above its estimate; 0 if nothing was kept."""
    exact = merge_mass(highs, masses, kept, kept_slots, row, SLOTS, ROWS)
    guess = merge_mass(estimate_highs, estimate_masses, estimate, estimate_slots, row, SLOTS, ROWS)
    known = (exact > float("-inf")) & (guess > float("-inf"))
    gap = tl.minimum(tl.maximum(exact - guess, -clamp_bits), clamp_bits)
    return tl.where(known, gap, 0.0)


@triton.jit
def merge(
    sums, highs, masses, fixed, fixed_slots, kept, kept_slots, far, far_slots, shift, row,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Mass and weighted values of three runs of partial sums, walked as one; `shift` lifts the far.

    One run, so that all loads of a row travel together.
    """
    d = tl.arange(0, D_PAD)
    high, mass = float("-inf"), 0.0
    value = tl.zeros([D_PAD], tl.float32)
    near = fixed_slots + kept_slots
    for start in range(0, near + far_slots, SLOTS):
        index = start + tl.arange(0, SLOTS)
        inside = index < near + far_slots
        slot = tl.where(index < fixed_slots, fixed + index, kept + index - fixed_slots)
        slot = tl.where(index < near, slot, far + index - near)
        at_ = slot.to(tl.int64) * ROWS + row
        mask = inside[:, None] & (d < D)[None, :]
        part = tl.load(sums + at_[:, None] * D + d[None, :], mask=mask, other=0.0)
        part_high = tl.load(highs + at_, mask=inside, other=float("-inf"))
        part_mass = tl.load(masses + at_, mask=inside, other=0.0)
        part_high += tl.where(index < near, 0.0, shift)
        top = tl.maximum(high, tl.max(part_high))
        safe = tl.where(top == float("-inf"), 0.0, top)
        weight, decay = tl.exp2(part_high - safe), tl.exp2(high - safe)
        mass = mass * decay + tl.sum(weight * part_mass)
        value = value * decay + tl.sum(weight[:, None] * part, 0)
        high = top
    return mass, value


@triton.jit
def combine_kernel(
    output, keys_read, counters, read_counts, sums, highs, masses, estimate_highs, estimate_masses,
    output_stride_batch, batch, problems, counter_stride, programs, fixed_base, fixed_slots,
    far_base, far_slots, estimate_slots, clamp_bits,
    GROUP: tl.constexpr, TILE_BATCH: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr, Z_PAD: tl.constexpr,
    SLOTS: tl.constexpr, CLUSTERED: tl.constexpr, CALIBRATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Partial sums -> one output row; grid `(problems, ROWS)`."""
    z, row = tl.program_id(0), tl.program_id(1)
    head, tile = problem(z, TILES)
    request = tile * TILE_BATCH + row // GROUP
    if PDL:
        gdc_wait()
    if request < batch:
        kept, kept_slots, shift = 0, 0, 0.0
        if CLUSTERED:
            _, begin, end = stream(counters, problems, counter_stride, TILE, Z_PAD)
            share = tl.cdiv(tl.max(end), programs)  # tiles of a program of `attend_kernel`
            kept = at(begin, z, Z_PAD) // share + z
            kept_slots = (at(end, z, Z_PAD) - 1) // share + z - kept + 1
            if row % GROUP == 0:
                read = tl.load(read_counts + z * TILE_BATCH + row // GROUP)
                tl.atomic_add(keys_read + request, read.to(tl.int64), sem="relaxed")
        if CALIBRATED:
            shift = calibration(
                highs, masses, kept, kept_slots, estimate_highs, estimate_masses,
                z * estimate_slots, estimate_slots, row, clamp_bits, SLOTS, ROWS,
            )  # fmt: skip
        mass, value = merge(
            sums, highs, masses, fixed_base + z * fixed_slots, fixed_slots, kept, kept_slots,
            far_base + z * far_slots, far_slots, shift, row, SLOTS, ROWS, D, D_PAD,
        )  # fmt: skip
        value = tl.where(mass > 0, value / mass, 0.0)  # a row of padding attends to nothing
        d = tl.arange(0, D_PAD)
        at_ = request.to(tl.int64) * output_stride_batch + (head * GROUP + row % GROUP) * D
        tl.store(output + at_ + d, value.to(output.dtype.element_ty), mask=d < D)
