"""Parts of a walk down the tree: which requests keep a node, and where the kept ones lie."""

import triton
import triton.language as tl

RUN = tl.constexpr(4)
"""Rows of one entry of the list of kept rows; an entry holds its first row times RUN, plus the
number of its rows less one, in 32 bits."""


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def keep_bits(score, threshold, selects, row, GROUP: tl.constexpr, TILE_BATCH: tl.constexpr, BITS):
    """Which requests keep each node `[N]`: bit `b` is set if any head of request `b` keeps it."""
    kept = ((score > threshold) & selects[:, None]).to(BITS)
    if TILE_BATCH == 1:
        return tl.max(kept, 0)
    return tl.reduce(kept << (row // GROUP)[:, None], 0, either)


@triton.jit
def spread(bits, row, GROUP: tl.constexpr):
    """Bit masks `[N]` -> which rows they mean, `[M, N]` bool."""
    return ((bits[None, :] >> (row // GROUP)[:, None]) & 1) != 0


@triton.jit
def members(first, begin, end, N: tl.constexpr):
    """Positions `[N]` in the concatenation of ranges, and whose each one is, `[ranges, N]`."""
    index = first + tl.arange(0, N)
    return index, (begin[:, None] <= index[None, :]) & (index[None, :] < end[:, None])


@triton.jit
def pick(member, values):
    """The value of the range that holds each position, `[N]`; zero behind the last range."""
    return tl.sum(tl.where(member, values[:, None], 0), 0)


@triton.jit
def append(nodes, node_bits, counter, bits, node, SHARED: tl.constexpr):
    """Append the kept nodes to a list."""
    kept = (bits != 0).to(tl.int32)
    total = tl.sum(kept)
    if total > 0:
        at = tl.atomic_add(counter, total, sem="relaxed") + tl.cumsum(kept, 0) - kept
        tl.store(nodes + at, node, mask=bits != 0)
        if SHARED:
            tl.store(node_bits + at, bits, mask=bits != 0)


@triton.jit
def append_runs(
    runs, run_bits, counter, bits, start, length, WRITE: tl.constexpr, SHARED: tl.constexpr
):
    """Append the rows `[start, start + length)` of the kept nodes to a list; returns how many rows.

    The list holds runs of up to RUN rows.
    """
    length = tl.where(bits != 0, length, 0)
    count = tl.cdiv(length, RUN)
    total = tl.sum(count)
    if total > 0:
        begin = tl.atomic_add(counter, total, sem="relaxed") + tl.cumsum(count, 0) - count
        for first in range(0, tl.max(count), WRITE):
            index = first + tl.arange(0, WRITE)
            mask = index[None, :] < count[:, None]
            at = begin[:, None] + index[None, :]
            done = index[None, :] * RUN
            run = (start[:, None] + done) * RUN + tl.minimum(length[:, None] - done, RUN) - 1
            tl.store(runs + at, run, mask=mask)
            if SHARED:
                tl.store(run_bits + at, tl.broadcast_to(bits[:, None], at.shape), mask=mask)
    return tl.sum(length)


@triton.jit
def normaliser(
    norm_highs, norm_masses, z, splits, row,
    ROWS: tl.constexpr, ROWS_PAD: tl.constexpr, SLOTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Log of the estimated softmax denominator over the context, in bits, `[M]`."""
    line = tl.arange(0, ROWS_PAD)  # rows without the padding that products of matrices need
    top = tl.full([ROWS_PAD], float("-inf"), tl.float32)
    total = tl.zeros([ROWS_PAD], tl.float32)
    for start in tl.static_range(0, SLOTS, STEP):
        slot = start + tl.arange(0, STEP)
        at = (z * splits + slot)[:, None] * ROWS + line[None, :]
        mask = (slot < splits)[:, None] & (line < ROWS)[None, :]
        high = tl.load(norm_highs + at, mask=mask, other=float("-inf"))
        mass = tl.load(norm_masses + at, mask=mask, other=0.0)
        new = tl.maximum(top, tl.max(high, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - safe) + tl.sum(mass * tl.exp2(high - safe[None, :]), 0)
        top = new
    norm = top + tl.log2(total)
    return tl.sum(tl.where(row[:, None] == line[None, :], norm[None, :], 0.0), 1)


@triton.jit
def attends_to_any(highs, slot, chunks, row, exists, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """Whether a row sees any recent token; one that sees none is padding and selects nothing."""
    chunk = tl.arange(0, SLOTS)
    mask = exists[:, None] & (chunk < chunks)[None, :]
    at = (slot + chunk)[None, :].to(tl.int64) * ROWS + row[:, None]
    return tl.max(tl.load(highs + at, mask=mask, other=float("-inf")), 1) > float("-inf")


@triton.jit
def log_mass(first, size):
    """Estimated log mass of nodes in bits, `[M, N]`, from first-order logits and sizes."""
    return first + tl.log2(tl.maximum(size, 1).to(tl.float32))[None, :]
