"""The matrices in which rows are encoded, as kernels use them (`squeezed.context.encoding`).

Rows are stored turned, so a query is turned once, at the beginning of a step, and an output once,
at its end. A turned query is written as two numbers of 8 bits per dimension, 15 bits together:
their products with codes are exact on tensor cores, which take codes as they are.
"""

import triton
import triton.language as tl

FINE = tl.constexpr(254)
"""Steps of the lower of the two numbers in one step of the upper."""


@triton.jit
def turn_query(
    query,
    key_turn,
    turned,
    units,
    z,
    head,
    tile,
    batch,
    scale_bits,
    GROUP: tl.constexpr,
    TILE_BATCH: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BITS: tl.constexpr,
):
    """Turn the query rows of a problem: two numbers per dimension, `[2 * R, D]` of `turned`.

    In `units [2, R]` lie what a step of the upper one is worth in a logit, in bits, and what the
    logit of levels has on top of that of codes, for a row's scale of 1.
    """
    STEP: tl.constexpr = D_PAD if D_PAD <= 128 else 64  # few, so that most loads are in flight
    queries, batch_stride, head_stride = query  # [B, Hq, 1, D]
    row, d, part = tl.arange(0, R), tl.arange(0, D_PAD), tl.arange(0, STEP)
    request = tile * TILE_BATCH + row // GROUP
    exists = (row < TILE_BATCH * GROUP) & (request < batch)
    line = request.to(tl.int64) * batch_stride + (head * GROUP + row % GROUP) * head_stride
    matrix = key_turn + head.to(tl.int64) * D * D  # of [Hkv, D, D]
    total = tl.zeros([R, D_PAD], tl.float32)
    for first in range(0, D, STEP):
        e = first + part
        there = exists[:, None] & (e < D)[None, :]
        q = tl.load(queries + line[:, None] + e[None, :], mask=there, other=0.0)
        inside = (e < D)[:, None] & (d < D)[None, :]
        entries = tl.load(matrix + e[:, None] * D + d[None, :], mask=inside, other=0.0)
        total = tl.dot(q, entries, acc=total, input_precision="ieee")
    unit = tl.maximum(tl.max(tl.abs(total), 1), 1e-30) / 127
    steps = total / unit[:, None]
    upper = tl.floor(steps + 0.5)
    lower = tl.floor((steps - upper) * FINE + 0.5)
    at = turned + (z.to(tl.int64) * 2 * R + row)[:, None] * D + d[None, :]
    inside = tl.broadcast_to((d < D)[None, :], at.shape)
    tl.store(at, upper.to(tl.int8), mask=inside)
    tl.store(at + R * D, lower.to(tl.int8), mask=inside)
    unit *= scale_bits
    zero = 7.5 if BITS == 4 else 0.0  # the code whose level is 0
    tl.store(units + z * 2 * R + row, unit)
    tl.store(units + z * 2 * R + R + row, -zero * unit * tl.sum(upper + lower / FINE, 1))


@triton.jit
def load_turn(value_turn, head, d, D: tl.constexpr, D_PAD: tl.constexpr):
    """Columns `d` of the matrix `[D_PAD, ..]` that turns a head's output back."""
    e = tl.arange(0, D_PAD)
    matrix = value_turn + head.to(tl.int64) * D * D  # of [Hkv, D, D]
    inside = (e < D)[:, None] & (d < D)[None, :]
    return tl.load(matrix + e[:, None] * D + d[None, :], mask=inside, other=0.0)
