"""Kernels of the second half of a decode step: listed rows -> partial sums -> output.

The listed rows of all problems form one stream of tiles that is cut into equal parts, one per
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
    """Listed rows of every problem, and where its tiles begin and end in the stream, `[Z_PAD]`."""
    z = tl.arange(0, Z_PAD)
    rows = tl.load(counters + z * stride, mask=z < problems, other=0)
    tiles = tl.cdiv(rows, TILE)
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
    """Exact attention of every problem over its list of rows; grid `(programs,)`."""
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
def merge(
    high, mass, value, sums, highs, masses, first, count, row, shift,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Fold a run of partial sums, their logits raised by `shift`, into `high`, `mass`, `value`."""
    d = tl.arange(0, D_PAD)
    for start in range(0, count, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        at_ = (first + slot).to(tl.int64) * ROWS + row
        mask = (slot < count)[:, None] & (d < D)[None, :]
        part = tl.load(sums + at_[:, None] * D + d[None, :], mask=mask, other=0.0)
        part_high = tl.load(highs + at_, mask=slot < count, other=float("-inf")) + shift
        part_mass = tl.load(masses + at_, mask=slot < count, other=0.0)
        top = tl.maximum(high, tl.max(part_high))
        safe = tl.where(top == float("-inf"), 0.0, top)
        weight, decay = tl.exp2(part_high - safe), tl.exp2(high - safe)
        mass = mass * decay + tl.sum(weight * part_mass)
        value = value * decay + tl.sum(weight[:, None] * part, 0)
        high = top
    return high, mass, value


@triton.jit
def combine_kernel(
    output, keys_read, counters, read_counts, sums, highs, masses, estimate_highs, estimate_masses,
    output_stride_batch, batch, problems, counter_stride, programs, fixed_base, fixed_slots,
    kept_base, kept_slots, far_base, far_slots, clamp_bits,
    GROUP: tl.constexpr, TILE_BATCH: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr, Z_PAD: tl.constexpr,
    SLOTS: tl.constexpr, CLUSTERED: tl.constexpr, FAR: tl.constexpr, CALIBRATED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Partial sums -> one output row; grid `(problems, ROWS)`."""
    z, row = tl.program_id(0), tl.program_id(1)
    head, tile = problem(z, TILES)
    request = tile * TILE_BATCH + row // GROUP
    high, mass = float("-inf"), 0.0
    value = tl.zeros([D_PAD], tl.float32)
    if PDL:
        gdc_wait()
    if request < batch:
        if CLUSTERED:
            _, begin, end = stream(counters, problems, counter_stride, TILE, Z_PAD)
            high, mass, value = merge(
                high, mass, value, sums, highs, masses, kept_base + z * kept_slots, kept_slots,
                row, 0.0, SLOTS, ROWS, D, D_PAD,
            )  # fmt: skip
            share = tl.maximum(tl.cdiv(tl.max(end), programs), 1)  # tiles of one program
            start, stop = at(begin, z, Z_PAD), at(end, z, Z_PAD)
            slots = tl.where(stop > start, (stop - 1) // share - start // share + 1, 0)
            high, mass, value = merge(
                high, mass, value, sums, highs, masses, start // share + z, slots, row, 0.0,
                SLOTS, ROWS, D, D_PAD,
            )  # fmt: skip
            if row % GROUP == 0:
                read = tl.load(read_counts + z * TILE_BATCH + row // GROUP)
                tl.atomic_add(keys_read + request, read.to(tl.int64), sem="relaxed")
        shift = 0.0
        if CALIBRATED and FAR:
            exact = high + tl.log2(mass)
            estimate = merge_mass(
                estimate_highs, estimate_masses, z * kept_slots, kept_slots, row,
                SLOTS, ROWS,
            )  # fmt: skip
            known = (exact > float("-inf")) & (estimate > float("-inf"))
            gap = tl.minimum(tl.maximum(exact - estimate, -clamp_bits), clamp_bits)
            shift = tl.where(known, gap, 0.0)  # nothing kept: no evidence
        if FAR:
            high, mass, value = merge(
                high, mass, value, sums, highs, masses, far_base + z * far_slots, far_slots, row,
                shift, SLOTS, ROWS, D, D_PAD,
            )  # fmt: skip
        high, mass, value = merge(
            high, mass, value, sums, highs, masses, fixed_base + z * fixed_slots, fixed_slots,
            row, 0.0, SLOTS, ROWS, D, D_PAD,
        )  # fmt: skip
        value = tl.where(mass > 0, value / mass, 0.0)  # a row of padding attends to nothing
        d = tl.arange(0, D_PAD)
        at_ = request.to(tl.int64) * output_stride_batch + (head * GROUP + row % GROUP) * D
        tl.store(output + at_ + d, value.to(output.dtype.element_ty), mask=d < D)
