"""Runs of kept rows that are encoded: how `attend_coded_kernel` reads them into its softmax.

A row is its leaf's mean and a turned difference: the mean's part of a logit was left by the walk,
the mean's part of the output is added run by run, and the differences are summed turned, in a sum
of their own.
"""

import triton
import triton.language as tl

from squeezed.attention.triton.codes import add_parts, key_parts, part_dims, value_parts
from squeezed.attention.triton.decode.attention import repeat
from squeezed.attention.triton.decode.selection import RUN, RUN_BITS, wanted_by
from squeezed.attention.triton.decode.stream import UNIT
from squeezed.attention.triton.decode.turning import FINE


@triton.jit
def load_turned(turned, z, R: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, K_PAD):
    """A problem's query rows as `turn_query` left them: `[2 * R, K_PAD]` for every part of keys."""
    WIDTH: tl.constexpr = D * BITS // 8
    row, k = tl.arange(0, 2 * R), tl.arange(0, K_PAD)
    line = turned + (z.to(tl.int64) * 2 * R + row)[:, None] * D + k[None, :]
    inside = tl.broadcast_to((k < WIDTH)[None, :], line.shape)
    lower = tl.load(line, mask=inside, other=0)
    if BITS == 8:
        return (lower,)
    else:
        return lower, tl.load(line + WIDTH, mask=inside, other=0)


@triton.jit
def code_logits(queries, units, codes, R: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr):
    """Logits `[R, N]` of the differences of keys, but for the rows' scales."""
    parts = key_parts(codes, BITS, PTX)
    total = tl.dot(queries[0], tl.trans(parts[0]), out_dtype=tl.int32)
    for part in tl.static_range(1, len(parts)):
        total = tl.dot(queries[part], tl.trans(parts[part]), acc=total, out_dtype=tl.int32)
    weight = tl.where(tl.arange(0, 2 * R) < R, 1.0, 1.0 / FINE)
    weighted = total.to(tl.float32) * weight[:, None]
    both = tl.sum(tl.reshape(weighted, (2, R, codes.shape[0])), 0)
    return both * units[0][:, None] + units[1][:, None]


@triton.jit
def load_runs(runs, start, stop, N: tl.constexpr):
    """Entries `[start, start + N)` of a list that ends at `stop`; behind it the last one.

    Read as a matrix: a vector would be loaded again in every layout that its uses ask for.
    """
    place = start + tl.arange(0, 2)[:, None] * (N // 2) + tl.arange(0, N // 2)[None, :]
    return tl.reshape(tl.load(runs + tl.minimum(place, stop - 1)), (N,))


@triton.jit
def load_leaves(leaf_logits, means, leaf, row, R: tl.constexpr, D: tl.constexpr, D_PAD):
    """Logits `[R, N]` and mean values `[N, D_PAD]` of the leaves of runs."""
    d = tl.arange(0, D_PAD)
    wide = leaf.to(tl.int64)
    logits = tl.load(leaf_logits + wide[None, :] * R + row[:, None])
    rows = means + wide[:, None] * D + d[None, :]
    if D == D_PAD:
        return logits, tl.load(rows)
    else:
        inside = tl.broadcast_to((d < D)[None, :], rows.shape)
        return logits, tl.load(rows, mask=inside, other=0.0)


@triton.jit
def load_codes(codes, place, WIDTH: tl.constexpr, PAD: tl.constexpr):
    """Rows `[N, PAD]` of codes."""
    k = tl.arange(0, PAD)
    rows = codes + place.to(tl.int64)[:, None] * WIDTH + k[None, :]
    if WIDTH == PAD:
        return tl.load(rows)
    else:
        inside = tl.broadcast_to((k < WIDTH)[None, :], rows.shape)
        return tl.load(rows, mask=inside, other=0)


@triton.jit
def attend_coded_runs(
    queries,
    units,
    coded,
    leaf_logits,
    means,
    kept,
    count,
    first,
    last,
    row,
    pinned,
    R: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    TILE: tl.constexpr,
    K_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    BITS: tl.constexpr,
    SHARED: tl.constexpr,
    PTX: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A running softmax over units `first:last` of a list of `count` runs of encoded rows.

    Returns peak, mass, the sum of the leaves' mean values, and that of the differences as the parts
    of `value_parts`, turned.
    """
    key_codes, value_codes, scales = coded  # [n, D * BITS / 8], [n, D * BITS / 16], [n]
    runs, run_bits = kept  # [runs] each
    RUNS: tl.constexpr = TILE // RUN
    PARTS: tl.constexpr = 16 // BITS
    lane, entry = tl.arange(0, TILE), tl.arange(0, RUNS)
    within, of = lane // RUNS, lane % RUNS  # the rows of a run lie far apart
    peak = tl.full([R], float("-inf"), tl.float32)
    mass = tl.zeros([R, TILE], tl.float32)  # of every lane, summed at the end
    acc = tl.zeros([R, D_PAD], tl.float32)
    zero = tl.zeros([R, V_PAD], tl.float32)
    turned = (zero,) * PARTS
    stop = tl.minimum(last * (UNIT // RUN), count)
    for start in tl.range(first * (UNIT // RUN), stop, RUNS, num_stages=STAGES):
        # Behind their ends a list repeats its last run and a run its last row, which costs no mask
        # and no memory traffic.
        index = tl.minimum(start + entry, stop - 1)
        packed = load_runs(runs, start, stop, RUNS)
        leaf, run = (packed & 0xFFFFFFFF).to(tl.int32), repeat((packed >> 32).to(tl.int32), TILE)
        live = (start + of < stop) & (within <= (run & (RUN - 1)))
        place = (run >> RUN_BITS) + tl.minimum(within, run & (RUN - 1)) - pinned
        key = load_codes(key_codes, place, D * BITS // 8, K_PAD)
        value = load_codes(value_codes, place, D * BITS // 16, V_PAD)
        both = tl.load(scales + place)  # a key's bfloat16 in the lower half, its value's above
        key_scale = (both << 16).to(tl.float32, bitcast=True)
        value_scale = (both & -65536).to(tl.float32, bitcast=True)
        leaf_logit, mean = load_leaves(leaf_logits, means, leaf, row, R, D, D_PAD)
        logits = code_logits(queries, units, key, R, BITS, PTX) * key_scale[None, :]
        base = tl.broadcast_to(leaf_logit[:, None, :], (R, RUN, RUNS))
        logits += tl.reshape(base, (R, TILE))
        attended = live[None, :]
        if SHARED:
            wanted = tl.load(run_bits + index)
            attended = attended & wanted_by(repeat(wanted, TILE), row // GROUP, 1)
        logits = tl.where(attended, logits, float("-inf"))
        new = tl.maximum(peak, tl.max(logits, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)  # all masked so far: avoid inf - inf
        weight = tl.exp2(logits - safe[:, None])
        decay = tl.exp2(peak - safe)[:, None]
        peak = new
        mass = mass * decay + weight
        of_run = tl.sum(tl.reshape(weight, (R, RUN, RUNS)), 1)
        acc = tl.dot(of_run.to(mean.dtype), mean, acc=acc * decay, input_precision="ieee")
        unit = tl.maximum(tl.max(value_scale), 1e-30)  # so that float16 holds what it weighs
        weight = (weight * (value_scale / unit)[None, :]).to(tl.float16)
        turned = add_parts(turned, decay, unit, weight, value_parts(value, BITS, PTX), BITS)
    return peak, tl.sum(mass, 1), acc, turned


@triton.jit
def store_turned(
    sums, slot, row, exists, parts, decay, ROWS: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr
):
    """Leave the turned sum of a slot, its dimensions in their order."""
    place = tl.arange(0, parts[0].shape[1])
    line = sums + (slot.to(tl.int64) * ROWS + row)[:, None] * D
    mask = exists[:, None] & (place < D * BITS // 16)[None, :]
    for part in tl.static_range(len(parts)):
        dims = part_dims(place, part, D, BITS)
        tl.store(line + dims[None, :], parts[part] * decay[:, None], mask=mask)
