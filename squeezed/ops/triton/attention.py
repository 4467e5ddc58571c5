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
    total = tl.max(end).to(tl.int64)
    programs = tl.minimum(tl.num_programs(0), total)
    cursor = (total * program // programs).to(tl.int32)
    stop = tl.where(program < programs, total * (program + 1) // programs, 0).to(tl.int32)
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
def merge_high(highs, first, count, row, SLOTS: tl.constexpr, ROWS: tl.constexpr):
    """Largest logit of a run of partial sums."""
    high = tl.full([SLOTS], float("-inf"), tl.float32)
    for start in range(0, count, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        at_ = (first + slot).to(tl.int64) * ROWS + row
        high = tl.maximum(high, tl.load(highs + at_, mask=slot < count, other=float("-inf")))
    return tl.max(high)


@triton.jit
def merge_sums(
    sums, highs, masses, first, count, row, high,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Mass and weighted values `[D_PAD]` of a run of partial sums, relative to `high`."""
    d = tl.arange(0, D_PAD)
    mass = tl.zeros([SLOTS], tl.float32)
    total = tl.zeros([SLOTS, D_PAD], tl.float32)
    for start in range(0, count, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        inside = slot < count
        at_ = (first + slot).to(tl.int64) * ROWS + row
        weight = tl.exp2(tl.load(highs + at_, mask=inside, other=float("-inf")) - high)
        mass += weight * tl.load(masses + at_, mask=inside, other=0.0)
        mask = inside[:, None] & (d < D)[None, :]
        total += weight[:, None] * tl.load(
            sums + at_[:, None] * D + d[None, :], mask=mask, other=0.0
        )
    return tl.sum(mass), tl.sum(total, 0)


@triton.jit
def merge_mass(highs, masses, first, count, row, SLOTS: tl.constexpr, ROWS: tl.constexpr):
    """Log-sum-exp of a run of partial sums, in bits; `-inf` if empty."""
    high = merge_high(highs, first, count, row, SLOTS, ROWS)
    safe = tl.where(high == float("-inf"), 0.0, high)
    mass = tl.zeros([SLOTS], tl.float32)
    for start in range(0, count, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        at_ = (first + slot).to(tl.int64) * ROWS + row
        weight = tl.exp2(tl.load(highs + at_, mask=slot < count, other=float("-inf")) - safe)
        mass += weight * tl.load(masses + at_, mask=slot < count, other=0.0)
    return high + tl.log2(tl.sum(mass))


@triton.jit
def combine_kernel(
    output, keys_read, counters, read_counts, sums, highs, masses, estimate_highs, estimate_masses,
    output_stride_batch, batch, problems, counter_stride, programs, fixed_base, fixed_slots,
    far_base, far_slots, estimate_slots, clamp_bits,
    GROUP: tl.constexpr, TILE_BATCH: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr, Z_PAD: tl.constexpr,
    SLOTS: tl.constexpr, CLUSTERED: tl.constexpr, FAR: tl.constexpr, CALIBRATED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Partial sums -> one output row; grid `(problems, ROWS)`."""
    z, row = tl.program_id(0), tl.program_id(1)
    head, tile = problem(z, TILES)
    request = tile * TILE_BATCH + row // GROUP
    if PDL:
        gdc_wait()
    if request < batch:
        fixed = fixed_base + z * fixed_slots
        high = merge_high(highs, fixed, fixed_slots, row, SLOTS, ROWS)
        shift = 0.0
        if CLUSTERED:
            _, begin, end = stream(counters, problems, counter_stride, TILE, Z_PAD)
            total = tl.max(end).to(tl.int64)
            used = tl.minimum(programs, total)
            # Program p holds tiles [total p // used, total (p + 1) // used); invert it for tile t.
            kept_first = (((at(begin, z, Z_PAD) + 1) * used - 1) // total).to(tl.int32) + z
            kept_last = ((at(end, z, Z_PAD) * used - 1) // total).to(tl.int32) + z
            kept_slots = kept_last - kept_first + 1
            kept_high = merge_high(highs, kept_first, kept_slots, row, SLOTS, ROWS)
            high = tl.maximum(high, kept_high)
            if row % GROUP == 0:
                read = tl.load(read_counts + z * TILE_BATCH + row // GROUP)
                tl.atomic_add(keys_read + request, read.to(tl.int64), sem="relaxed")
        if FAR:
            far = far_base + z * far_slots
            if CALIBRATED:
                exact = merge_mass(highs, masses, kept_first, kept_slots, row, SLOTS, ROWS)
                estimate = merge_mass(
                    estimate_highs, estimate_masses, z * estimate_slots, estimate_slots, row,
                    SLOTS, ROWS,
                )  # fmt: skip
                known = (exact > float("-inf")) & (estimate > float("-inf"))
                gap = tl.minimum(tl.maximum(exact - estimate, -clamp_bits), clamp_bits)
                shift = tl.where(known, gap, 0.0)  # nothing kept: no evidence
            far_high = merge_high(highs, far, far_slots, row, SLOTS, ROWS)
            high = tl.maximum(high, far_high + shift)
        high = tl.where(high == float("-inf"), 0.0, high)
        mass, value = merge_sums(
            sums, highs, masses, fixed, fixed_slots, row, high, SLOTS, ROWS, D, D_PAD
        )
        if CLUSTERED:
            mass_, value_ = merge_sums(
                sums, highs, masses, kept_first, kept_slots, row, high, SLOTS, ROWS, D, D_PAD
            )
            mass, value = mass + mass_, value + value_
        if FAR:
            mass_, value_ = merge_sums(
                sums, highs, masses, far, far_slots, row, high - shift, SLOTS, ROWS, D, D_PAD
            )
            mass, value = mass + mass_, value + value_
        value = tl.where(mass > 0, value / mass, 0.0)  # a row of padding attends to nothing
        d = tl.arange(0, D_PAD)
        at_ = request.to(tl.int64) * output_stride_batch + (head * GROUP + row % GROUP) * D
        tl.store(output + at_ + d, value.to(output.dtype.element_ty), mask=d < D)
