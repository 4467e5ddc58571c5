"""Dot products and sums over rows of two codes to a byte, as they lie: nothing is unpacked first.

A byte holds the code of dimension `d` below that of `d + D / 2`, from 0 to 15. It is read as two
numbers, itself and its lower code, for that costs no shift: queries are halved before (`halved`),
and sums after (`upper_codes`), so that these stand for the two codes. A level is a code less the
encoding's zero, which is left to the caller: it is the same for all dimensions of a row.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from squeezed.attention.cpu.compiled import compiled
from squeezed.attention.cpu.numerics import AHEAD, REORDER, load, prefetch_row


@intrinsic
def _byte(typing_context, array, index):
    """Byte `index` of a contiguous array, as int32; see `numerics.load`."""

    def codegen(context, builder, signature, args):
        base = context.make_array(signature.args[0])(context, builder, args[0]).data
        element = builder.load(builder.gep(base, [args[1]], inbounds=True))
        element.set_metadata("invariant.load", builder.module.add_metadata([]))
        return builder.zext(element, ir.IntType(32))

    return types.int32(array, types.intp), codegen


@compiled
def _lower(byte):
    return np.float32(byte & np.int32(15))


def halved(q):
    """Queries `[..., D]` as `nibble_dots` takes them: with `u` above and `l` below, a byte is
    `16 u + l`, so that `q0 l + q1 u = (q0 - q1 / 16) l + q1 / 16 (16 u + l)`."""
    lower, upper = np.split(q, 2, -1)
    upper = upper / np.float32(16)
    return np.concatenate([lower - upper, upper], -1)


@compiled(fastmath=REORDER)
def nibble_dots(q, flat, offsets, count, out):
    """`out[r, t] = q[r] . codes of flat[offsets[t]:]` for all rows `r` of `q` and `t < count`.

    Args:
        q: halved. Four rows by two keys at a time; an odd count computes its last key twice.
    """
    rows, dim = q.shape
    half, fours = dim // 2, rows - rows % 4
    if count % 2:
        offsets[count] = offsets[count - 1]
    for t in range(0, count, 2):
        o0, o1 = offsets[t], offsets[t + 1]
        if t + AHEAD + 1 < count:
            prefetch_row(flat, offsets[t + AHEAD], half)
            prefetch_row(flat, offsets[t + AHEAD + 1], half)
        for r in range(0, fours, 4):
            p0, p1, p2, p3 = r * dim, (r + 1) * dim, (r + 2) * dim, (r + 3) * dim
            s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = np.float32(0.0)
            for d in range(half):
                b0, b1 = _byte(flat, o0 + d), _byte(flat, o1 + d)
                x0, x1 = _lower(b0), _lower(b1)
                q0, q1, q2, q3 = load(q, p0 + d), load(q, p1 + d), load(q, p2 + d), load(q, p3 + d)
                s00, s01, s02, s03 = s00 + q0 * x0, s01 + q1 * x0, s02 + q2 * x0, s03 + q3 * x0
                s10, s11, s12, s13 = s10 + q0 * x1, s11 + q1 * x1, s12 + q2 * x1, s13 + q3 * x1
                x0, x1, e = np.float32(b0), np.float32(b1), d + half
                q0, q1, q2, q3 = load(q, p0 + e), load(q, p1 + e), load(q, p2 + e), load(q, p3 + e)
                s00, s01, s02, s03 = s00 + q0 * x0, s01 + q1 * x0, s02 + q2 * x0, s03 + q3 * x0
                s10, s11, s12, s13 = s10 + q0 * x1, s11 + q1 * x1, s12 + q2 * x1, s13 + q3 * x1
            out[r, t], out[r + 1, t], out[r + 2, t], out[r + 3, t] = s00, s01, s02, s03
            out[r, t + 1], out[r + 1, t + 1] = s10, s11
            out[r + 2, t + 1], out[r + 3, t + 1] = s12, s13
        for r in range(fours, rows):
            s00 = s10 = np.float32(0.0)
            for d in range(half):
                b0, b1 = _byte(flat, o0 + d), _byte(flat, o1 + d)
                q0, q1 = load(q, r * dim + d), load(q, r * dim + half + d)
                s00 += q0 * _lower(b0) + q1 * np.float32(b0)
                s10 += q0 * _lower(b1) + q1 * np.float32(b1)
            out[r, t], out[r, t + 1] = s00, s10


@compiled(fastmath=REORDER)
def add_lower(weights, count, flat, offsets, acc):
    """`acc[r] += sum over t of weights[r, t] * lower codes of flat[offsets[t]:]`.

    `count` is a multiple of 4, `acc [R, D / 2]`. Four rows by four values at a time, as
    `numerics.add_values`, which adds the bytes themselves.
    """
    rows, half = acc.shape
    fours = rows - rows % 4
    for t in range(0, count, 4):
        o0, o1, o2, o3 = offsets[t], offsets[t + 1], offsets[t + 2], offsets[t + 3]
        for r in range(0, fours, 4):
            a0, a1, a2, a3 = acc[r], acc[r + 1], acc[r + 2], acc[r + 3]
            w = weights[r : r + 4, t : t + 4]
            w00, w01, w02, w03 = w[0, 0], w[0, 1], w[0, 2], w[0, 3]
            w10, w11, w12, w13 = w[1, 0], w[1, 1], w[1, 2], w[1, 3]
            w20, w21, w22, w23 = w[2, 0], w[2, 1], w[2, 2], w[2, 3]
            w30, w31, w32, w33 = w[3, 0], w[3, 1], w[3, 2], w[3, 3]
            for d in range(half):
                x0, x1 = _lower(_byte(flat, o0 + d)), _lower(_byte(flat, o1 + d))
                x2, x3 = _lower(_byte(flat, o2 + d)), _lower(_byte(flat, o3 + d))
                a0[d] += w00 * x0 + w01 * x1 + w02 * x2 + w03 * x3
                a1[d] += w10 * x0 + w11 * x1 + w12 * x2 + w13 * x3
                a2[d] += w20 * x0 + w21 * x1 + w22 * x2 + w23 * x3
                a3[d] += w30 * x0 + w31 * x1 + w32 * x2 + w33 * x3
        for r in range(fours, rows):
            a0, w = acc[r], weights[r, t : t + 4]
            w00, w01, w02, w03 = w[0], w[1], w[2], w[3]
            for d in range(half):
                x0, x1 = _lower(_byte(flat, o0 + d)), _lower(_byte(flat, o1 + d))
                x2, x3 = _lower(_byte(flat, o2 + d)), _lower(_byte(flat, o3 + d))
                a0[d] += w00 * x0 + w01 * x1 + w02 * x2 + w03 * x3


@compiled
def upper_codes(whole, lower):
    """Sum of the upper codes, from that of whole bytes and that of the lower codes."""
    return (whole - lower) * np.float32(0.0625)
