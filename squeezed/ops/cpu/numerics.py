"""Scalar and tile arithmetic of the CPU kernels: widening loads, exp, dot products, online softmax.

Keys of every width are read as one-dimensional arrays of elements, and a row is named by the offset
of its first element, so that any strides work. `uint16` elements are bfloat16 and `int16` elements
are float16: Numba knows neither, the array's type tells them apart.

Reductions may be reordered (`reassoc`), but infinities and NaN keep their meaning.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

REORDER = {"reassoc", "contract", "nsz", "arcp"}
TILE = 64
"""Rows that share one step of the online softmax."""

_LOG2_E = np.float32(1.0 / math.log(2.0))
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_UNDERFLOW = np.float32(-87.0)
_TAYLOR = tuple(np.float32(1.0 / math.factorial(n)) for n in range(2, 8))


@intrinsic
def widen(typing_context, element):
    """A stored element as float32."""

    def codegen(context, builder, signature, args):
        if element == types.uint16:  # bfloat16 is the upper half of a float32
            bits = builder.shl(
                builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16)
            )
            return builder.bitcast(bits, ir.FloatType())
        if element == types.int16:
            return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())
        return args[0]

    return types.float32(element), codegen


@intrinsic
def _float_of_bits(typing_context, bits):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@njit(cache=True)
def exp_nonpositive(x):
    """`exp(x)` for `x <= 0`, float32, to about 1 ulp; below -87 it is 0. Written to vectorise."""
    clamped = max(x, _UNDERFLOW)
    n = np.int32(clamped * _LOG2_E - np.float32(0.5))
    r = (clamped - np.float32(n) * _LN2_HIGH) - np.float32(n) * _LN2_LOW
    c2, c3, c4, c5, c6, c7 = _TAYLOR
    tail = c2 + r * (c3 + r * (c4 + r * (c5 + r * (c6 + r * c7))))
    power = _float_of_bits(np.int32((n + np.int32(127)) << np.int32(23)))
    value = (np.float32(1.0) + (r + r * r * tail)) * power
    return value if x >= _UNDERFLOW else np.float32(0.0) * value


@njit(cache=True, fastmath=REORDER)
def dot_four(q, r, row, out, t):
    """Products of query rows `r .. r+3` with one key row, into `out[r .. r+3, t]`."""
    q0, q1, q2, q3 = q[r], q[r + 1], q[r + 2], q[r + 3]
    s0 = s1 = s2 = s3 = np.float32(0.0)
    for d in range(row.shape[0]):
        x = widen(row[d])
        s0 += q0[d] * x
        s1 += q1[d] * x
        s2 += q2[d] * x
        s3 += q3[d] * x
    out[r, t], out[r + 1, t], out[r + 2, t], out[r + 3, t] = s0, s1, s2, s3


@njit(cache=True, fastmath=REORDER)
def dot_one(q, row):
    total = np.float32(0.0)
    for d in range(row.shape[0]):
        total += q[d] * widen(row[d])
    return total


@njit(cache=True)
def dots(q, flat, offsets, count, out):
    """`out[r, t] = q[r] . flat[offsets[t]:]` for all rows `r` of `q` and `t < count`."""
    rows, dim = q.shape
    fours = rows - rows % 4
    for t in range(count):
        row = flat[offsets[t] : offsets[t] + dim]
        for r in range(0, fours, 4):
            dot_four(q, r, row, out, t)
        for r in range(fours, rows):
            out[r, t] = dot_one(q[r], row)


@njit(cache=True, fastmath=REORDER)
def _add_four_by_four(acc, r, weights, flat, offsets, t):
    """`acc[r+i] += weights[r+i, t+j] * row[t+j]` for `i, j < 4`: each loaded element is used often."""
    dim = acc.shape[1]
    v0, v1 = flat[offsets[t] :][:dim], flat[offsets[t + 1] :][:dim]
    v2, v3 = flat[offsets[t + 2] :][:dim], flat[offsets[t + 3] :][:dim]
    a0, a1, a2, a3 = acc[r], acc[r + 1], acc[r + 2], acc[r + 3]
    w0, w1, w2, w3 = weights[r], weights[r + 1], weights[r + 2], weights[r + 3]
    for d in range(dim):
        x0, x1, x2, x3 = widen(v0[d]), widen(v1[d]), widen(v2[d]), widen(v3[d])
        a0[d] += w0[t] * x0 + w0[t + 1] * x1 + w0[t + 2] * x2 + w0[t + 3] * x3
        a1[d] += w1[t] * x0 + w1[t + 1] * x1 + w1[t + 2] * x2 + w1[t + 3] * x3
        a2[d] += w2[t] * x0 + w2[t + 1] * x1 + w2[t + 2] * x2 + w2[t + 3] * x3
        a3[d] += w3[t] * x0 + w3[t + 1] * x1 + w3[t + 2] * x2 + w3[t + 3] * x3


@njit(cache=True, fastmath=REORDER)
def _add_four(accumulator, weights, flat, offsets, t):
    """The same for a single query row."""
    dim = accumulator.shape[0]
    v0, v1 = flat[offsets[t] :][:dim], flat[offsets[t + 1] :][:dim]
    v2, v3 = flat[offsets[t + 2] :][:dim], flat[offsets[t + 3] :][:dim]
    w0, w1, w2, w3 = weights[t], weights[t + 1], weights[t + 2], weights[t + 3]
    for d in range(dim):
        low = w0 * widen(v0[d]) + w1 * widen(v1[d])
        accumulator[d] += low + w2 * widen(v2[d]) + w3 * widen(v3[d])


@njit(cache=True, fastmath={"reassoc", "nnan", "nsz"})
def largest(values, count):
    top = np.float32(-np.inf)
    for t in range(count):
        top = max(top, values[t])
    return top


@njit(cache=True, fastmath=REORDER)
def total(values, count):
    result = np.float32(0.0)
    for t in range(count):
        result += values[t]
    return result


@njit(cache=True)
def log_sum(mass, top):
    """Logarithm of `mass * exp(top)`; `-inf` if there is no mass."""
    return top + np.float32(math.log(mass)) if mass > 0 else np.float32(-np.inf)


@njit(cache=True)
def _weigh(logits, count, r, top, mass, acc):
    """Turn one row of logits into softmax weights under a running maximum."""
    here = largest(logits[r], count)
    if here > top[r]:
        shrink = exp_nonpositive(top[r] - here)
        top[r] = here
        mass[r] *= shrink
        for d in range(acc.shape[1]):
            acc[r, d] *= shrink
    if top[r] == -np.inf:
        logits[r, :count] = 0.0  # every key so far is masked
        return
    for t in range(count):
        logits[r, t] = exp_nonpositive(logits[r, t] - top[r])
    mass[r] += total(logits[r], count)


@njit(cache=True)
def absorb(logits, count, flat, offsets, top, mass, acc):
    """One step of the online softmax: add `count <= TILE` values with these logits.

    `top[r]`, `mass[r]`, `acc[r]` hold the running maximum, sum of weights and weighted values.
    `logits` is overwritten; its rows and `offsets` have room for TILE entries.
    """
    rows = acc.shape[0]
    for r in range(rows):
        _weigh(logits, count, r, top, mass, acc)
    padded = (count + 3) // 4 * 4
    for t in range(count, padded):
        offsets[t] = offsets[count - 1]
        logits[:, t] = 0.0
    fours = rows - rows % 4
    for t in range(0, padded, 4):
        for r in range(0, fours, 4):
            _add_four_by_four(acc, r, logits, flat, offsets, t)
        for r in range(fours, rows):
            _add_four(acc[r], logits[r], flat, offsets, t)
