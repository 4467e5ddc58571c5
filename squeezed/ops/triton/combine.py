"""The kernel that ends a decode step: partial sums -> output."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from squeezed.ops.triton.attention import at, stream
from squeezed.ops.triton.tile import problem


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
    sums, highs, masses, near, near_slots, fixed, fixed_slots, far, far_slots, shift, row, d,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Mass and weighted values of three runs of partial sums, walked as one; `shift` lifts the far.

    One run, so that all loads of a row travel together.
    """
    high, mass = float("-inf"), 0.0
    value = tl.zeros([DIMS], tl.float32)
    exact = near_slots + fixed_slots
    for start in range(0, exact + far_slots, SLOTS):
        index = start + tl.arange(0, SLOTS)
        inside = index < exact + far_slots
        slot = tl.where(index < near_slots, near + index, fixed + index - near_slots)
        slot = tl.where(index < exact, slot, far + index - exact)
        place = slot.to(tl.int64) * ROWS + row
        mask = inside[:, None] & (d < D)[None, :]
        part = tl.load(sums + place[:, None] * D + d[None, :], mask=mask, other=0.0)
        part_high = tl.load(highs + place, mask=inside, other=float("-inf"))
        part_mass = tl.load(masses + place, mask=inside, other=0.0)
        part_high += tl.where(index < exact, 0.0, shift)
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
    output_stride_batch, batch, problems, programs, fixed_base, fixed_slots, far_base,
    estimate_slots, clamp_bits,
    GROUP: tl.constexpr, TILE_BATCH: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DIMS: tl.constexpr,
    Z_PAD: tl.constexpr, SLOTS: tl.constexpr, CLUSTERED: tl.constexpr, CALIBRATED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid `(problems, ROWS, dimensions / DIMS)`; a program writes a part of one output row."""
    z, row, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head, tile = problem(z, TILES)
    request = tile * TILE_BATCH + row // GROUP
    d = share * DIMS + tl.arange(0, DIMS)
    near, near_slots, shift = 0, 0, 0.0
    if CLUSTERED:  # the kernel before starts this one only when the lists are complete
        _runs, _dropped, _near, begin, end = stream(counters, problems, Z_PAD)
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
        if CALIBRATED:
            shift = calibration(
                highs, masses, near, near_slots, estimate_highs, estimate_masses,
                z * estimate_slots, estimate_slots, row, clamp_bits, SLOTS, ROWS,
            )  # fmt: skip
        mass, value = merge(
            sums, highs, masses, near, near_slots, fixed_base + z * fixed_slots, fixed_slots,
            far_base + near, near_slots if CALIBRATED else 0, shift, row, d, SLOTS, ROWS, D, DIMS,
        )  # fmt: skip
        value = tl.where(mass > 0, value / mass, 0.0)  # a row of padding attends to nothing
        place = request.to(tl.int64) * output_stride_batch + (head * GROUP + row % GROUP) * D
        tl.store(output + place + d, value.to(output.dtype.element_ty), mask=d < D)
