"""Parts of a walk down the tree: which requests keep a node, and where the kept ones lie."""

import triton
import triton.language as tl

RUN_BITS = tl.constexpr(2)
RUN = tl.constexpr(1 << RUN_BITS.value)
"""Rows of one entry of the list of kept rows; an entry holds its first row times RUN, plus the
number of its rows less one, in 32 bits."""


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def keep_bits(score, bar, row, GROUP: tl.constexpr, TILE_BATCH: tl.constexpr, BITS):
    """Which requests keep each node `[N]`: bit `b` is set if a head of request `b` clears the bar.

    Args:
        score: `[N, R]`; bar: `[R]`, what it must exceed, the normaliser included.
    """
    if TILE_BATCH == 1:
        return tl.max((score > bar[None, :]).to(BITS), 1)
    own = tl.full(row.shape, 1, BITS) << (row // GROUP)
    return tl.reduce(tl.where(score > bar[None, :], own[None, :], 0), 1, either)


@triton.jit
def wanted_by(bits, request, AXIS: tl.constexpr):
    """Bit masks `[N]` -> which of some rows' requests they name, bool; they lie along `AXIS`."""
    request = tl.expand_dims(request, AXIS)
    return ((tl.expand_dims(bits, 1 - AXIS) >> request) & 1) != 0


@triton.jit
def hand_down(target, begin, end, value, WIDTH: tl.constexpr):
    """Write the value of every node `[N]` to each of its children, `begin` to `end`."""
    for first in range(0, tl.max(end - begin), WIDTH):
        child = begin[:, None] + first + tl.arange(0, WIDTH)[None, :]
        tl.store(target + child, tl.broadcast_to(value[:, None], child.shape), child < end[:, None])


@triton.jit
def reserve(counter, runs, dropped):
    """Room for more runs of kept rows and more dropped nodes: where each begins.

    Both counts share 64 bits, so that one trip to the memory serves both.
    """
    taken = tl.atomic_add(counter, runs.to(tl.int64) + (dropped.to(tl.int64) << 32), sem="relaxed")
    return unpack(taken)


@triton.jit
def unpack(counted):
    """Runs of kept rows and dropped nodes of a counter."""
    return (counted & 0xFFFFFFFF).to(tl.int32), (counted >> 32).to(tl.int32)


@triton.jit
def append_runs(
    kept,
    begin,
    bits,
    node,
    start,
    length,
    count,
    WRITE: tl.constexpr,
    SHARED: tl.constexpr,
    CODED: tl.constexpr,
):
    """Write rows `[start, start + length)` of kept nodes as `count` runs each, from `begin` on.

    CODED: the node stands in the lower 32 bits of an entry of 64, its run above.
    """
    runs, run_bits = kept  # [runs] each
    for first in range(0, tl.max(count), WRITE):
        index = first + tl.arange(0, WRITE)
        mask = index[None, :] < count[:, None]
        at = begin[:, None] + index[None, :]
        done = index[None, :] * RUN
        run = (start[:, None] + done) * RUN + tl.minimum(length[:, None] - done, RUN) - 1
        if CODED:
            run = (run.to(tl.int64) << 32) | node[:, None]
        tl.store(runs + at, run, mask=mask)
        if SHARED:
            tl.store(run_bits + at, tl.broadcast_to(bits[:, None], at.shape), mask=mask)


@triton.jit
def append_nodes(
    far,
    first,
    dropped,
    node,
    variance,
    logit,
    row,
    exists,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SHARED: tl.constexpr,
    DIPOLE: tl.constexpr,
):
    """Write the nodes that any request dropped from place `first` on, with variances and masses.

    Args:
        dropped: `[N]`, which requests drop a node, as bits; to the others it counts nothing.
        logit: `[N, R]`, logarithms of the masses, in bits.
    """
    nodes, variances, logits = far  # [nodes] twice, [nodes, ROWS]
    chosen = dropped != 0
    at = first + tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(nodes + at, node, mask=chosen)
    if DIPOLE:
        tl.store(variances + at, variance, mask=chosen)
    if SHARED:
        logit = tl.where(wanted_by(dropped, row // GROUP, 0), logit, float("-inf"))
    place = at.to(tl.int64)[:, None] * ROWS + row[None, :]
    tl.store(logits + place, logit, mask=chosen[:, None] & exists[None, :])


@triton.jit
def normaliser(
    norms,
    z,
    row,
    ROWS: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    SLOTS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Log of the estimated softmax denominator over the context, in bits, `[M]`."""
    peaks, masses, splits = norms  # [Z, splits, ROWS] twice
    line = tl.arange(0, ROWS_PAD)  # rows without the padding that products of matrices need
    peak = tl.full([ROWS_PAD], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS_PAD], tl.float32)
    for start in tl.static_range(0, SLOTS, STEP):
        slot = start + tl.arange(0, STEP)
        at = (z * splits + slot)[:, None] * ROWS + line[None, :]
        there = (slot < splits)[:, None] & (line < ROWS)[None, :]
        part = tl.load(peaks + at, mask=there, other=float("-inf"))
        part_mass = tl.load(masses + at, mask=there, other=0.0)
        new = tl.maximum(peak, tl.max(part, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        mass = mass * tl.exp2(peak - safe) + tl.sum(part_mass * tl.exp2(part - safe[None, :]), 0)
        peak = new
    norm = peak + tl.log2(mass)
    if row.shape[0] == ROWS_PAD:
        return norm  # no padding to bring back
    return tl.sum(tl.where(row[:, None] == line[None, :], norm[None, :], 0.0), 1)


@triton.jit
def log_size(size):
    """Logarithm of the sizes of nodes, in bits; 0 of empty ones."""
    return tl.log2(tl.maximum(size, 1).to(tl.float32))
