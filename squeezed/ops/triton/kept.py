"""What becomes of kept ranges of rows: attended on the spot, or listed for the next kernel.

A program attends at once to what its own selection keeps, up to a limit, so that nothing waits for
a list; what exceeds the limit is listed, and the next kernel shares it out among all programs.
"""

import triton
import triton.language as tl

from squeezed.ops.triton.tile import fold, load_rows


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
    """Append the ranges `[start, start + length)` of the kept nodes to a list, in any order."""
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


@triton.jit
def attend_kept(
    q, high, mass, total, keys, values, bits, start, size, row, scale_bits,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr,
    MOST: tl.constexpr, STAGES: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Fold the first `MOST` rows of the kept ranges into the sums; also returns what is left."""
    length = tl.where(bits != 0, size, 0)
    end = tl.cumsum(length, 0)
    begin = end - length
    count = tl.minimum(tl.sum(length), MOST)
    everywhere = tl.full([TILE], True, tl.int1)
    for first in tl.range(0, count, TILE, num_stages=STAGES):
        position, member = members(first, begin, end, TILE)
        live = position < count
        kept = tl.where(live, position + pick(member, start - begin), 0)  # row 0: padding
        key = load_rows(keys, kept, everywhere, D, D, D_PAD)
        value = load_rows(values, kept, everywhere, D, D, D_PAD)
        attended = live[None, :]
        if SHARED:
            wanted = pick(member, bits)
            attended &= ((wanted[None, :] >> (row // GROUP)[:, None]) & 1) != 0
        logits = tl.where(attended, tl.dot(q, tl.trans(key)) * scale_bits, float("-inf"))
        high, mass, total = fold(high, mass, total, logits, value)
    done = tl.minimum(tl.maximum(count - begin, 0), length)
    return high, mass, total, start + done, length - done
