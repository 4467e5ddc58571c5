"""Parts of the selection kernel: which requests keep a node, and what becomes of it.

A kept node goes to a list, as a range of rows (leaves) or by its index (levels above). A dropped
node joins the far field.
"""

import triton
import triton.language as tl

from squeezed.ops.triton.tile import fold, fold_mass


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
    """Positions `[N]` in the concatenation of ranges, and whose each one is, `[N, ranges]`."""
    index = first + tl.arange(0, N)
    return index, (begin[None, :] <= index[:, None]) & (index[:, None] < end[None, :])


@triton.jit
def pick(member, values):
    """The value of the range that holds each position, `[N]`; zero behind the last range."""
    return tl.sum(tl.where(member, values[None, :], 0), 1)


@triton.jit
def append(rows, row_bits, counter, bits, start, length, WRITE: tl.constexpr, SHARED: tl.constexpr):
    """Append the ranges `[start, start + length)` of the kept nodes to a list; returns how much."""
    length = tl.where(bits != 0, length, 0)
    total = tl.sum(length)
    if total > 0:
        base = tl.atomic_add(counter, total, sem="relaxed")
        begin = base + tl.cumsum(length, 0) - length
        for first in range(0, tl.max(length), WRITE):
            index = first + tl.arange(0, WRITE)
            mask = index[None, :] < length[:, None]
            at = begin[:, None] + index[None, :]
            tl.store(rows + at, start[:, None] + index[None, :], mask=mask)
            if SHARED:
                tl.store(row_bits + at, tl.broadcast_to(bits[:, None], at.shape), mask=mask)
    return total


@triton.jit
def normaliser(
    norm_highs, norm_masses, z, splits, row, exists,
    ROWS: tl.constexpr, M: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Log of the estimated softmax denominator over the context, in bits, `[M]`."""
    slot = tl.arange(0, SLOTS)
    at = (z * splits + slot)[None, :] * ROWS + row[:, None]
    mask = exists[:, None] & (slot < splits)[None, :]
    high = tl.load(norm_highs + at, mask=mask, other=float("-inf"))
    mass = tl.load(norm_masses + at, mask=mask, other=0.0)
    top = tl.max(high, 1)
    safe = tl.where(top == float("-inf"), 0.0, top)
    return top + tl.log2(tl.sum(mass * tl.exp2(high - safe[:, None]), 1))


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


@triton.jit
def load_parents(
    index, limit, z, head, row, exists, logits, listed, listed_bits, offsets, child_offsets,
    variance, parents, BITS: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr, TOP: tl.constexpr,
    FLAT: tl.constexpr, SHARED: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """What one block of parents needs: from the coarsest logits (TOP) or from a list of kept ones.

    Returns node, bits of the requests that kept it, first row and size, first child and number of
    children, first-order logits `[M, N]`, variance.
    """
    inside = index < limit
    node, bits = index, inside.to(BITS)
    start = tl.zeros(index.shape, tl.int32)
    size, first_child, children = start, start, start
    first = tl.zeros([M, index.shape[0]], tl.float32)
    spread = tl.zeros(index.shape, tl.float32)
    if not TOP:
        node = tl.load(listed + index, mask=inside, other=0)
        if SHARED:
            bits = tl.load(listed_bits + index, mask=inside, other=0)
    at = head * (parents + 1) + node
    if TOP:
        start = tl.load(offsets + at, mask=inside, other=0)
        size = tl.load(offsets + at + 1, mask=inside, other=0) - start
        line = (z * ROWS + row).to(tl.int64) * parents
        mask = exists[:, None] & inside[None, :]
        first = tl.load(logits + line[:, None] + node[None, :], mask=mask, other=float("-inf"))
        if SECOND:
            spread = tl.load(variance + head * parents + node, mask=inside, other=0.0)
    if not FLAT:
        first_child = tl.load(child_offsets + at, mask=inside, other=0)
        children = tl.load(child_offsets + at + 1, mask=inside, other=0) - first_child
    return node, bits, start, size, first_child, children, first, spread


@triton.jit
def settle(
    high, mass, total, estimate_high, estimate, read,
    first, node, start, size, bits, listed, alive, value, found, found_bits, counter, row, exists,
    SINK: tl.constexpr, LEAVES: tl.constexpr, FAR: tl.constexpr, CALIBRATED: tl.constexpr,
    GROUP: tl.constexpr, WRITE: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Send `listed` nodes to the list, and those alive but not kept (`bits`) to the far field."""
    if FAR:
        dropped = spread(alive & ~bits, row, GROUP) & exists[:, None]
        logits = tl.where(dropped, log_mass(first, size), float("-inf"))
        high, mass, total = fold(high, mass, total, logits, value)
    if SINK:
        if LEAVES:
            found_rows = append(found, found_bits, counter, listed, start, size, WRITE, SHARED)
            if SHARED:
                kept = spread(listed, row, GROUP)
                read += tl.sum(tl.where(kept, size[None, :], 0), 1)
            else:
                read += found_rows
            if CALIBRATED:
                kept = spread(listed, row, GROUP)
                logits = tl.where(kept, log_mass(first, size), float("-inf"))
                estimate_high, estimate, _, _ = fold_mass(estimate_high, estimate, logits)
        else:
            once = tl.full(size.shape, 1, tl.int32)
            append(found, found_bits, counter, listed, node, once, WRITE, SHARED)
    return high, mass, total, estimate_high, estimate, read
