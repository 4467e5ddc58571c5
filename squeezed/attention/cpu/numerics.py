"""Scalar and tile arithmetic of the CPU kernels: widening loads, exp, dot products, online softmax.

Keys of every width are read as one-dimensional arrays of elements, and a row is named by the offset
of its first element, so that any strides work. `uint16` elements are bfloat16 and `int16` elements
are float16: Numba knows neither, the array's type tells them apart. `int8` and `uint8`
elements are codes.

Reductions may be reordered (`reassoc`), but infinities and NaN keep their meaning.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from squeezed.attention.cpu.compiled import compiled

REORDER = {"reassoc", "contract", "nsz", "arcp"}
TILE = 64
"""Rows that share one step of the online softmax."""
AHEAD = 6
"""Rows between the one in use and the one asked for: leaves are too short for the hardware."""

_LOG2_E = np.float32(1.0 / math.log(2.0))
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_UNDERFLOW = np.float32(-87.0)
_TAYLOR = tuple(np.float32(1.0 / math.factorial(n)) for n in range(2, 8))


@intrinsic
def load(typing_context, array, index):
    """Element `index` of a contiguous array, flattened, as float32. For memory nobody writes.

    No bounds, no wrap-around, no reference count, and marked invariant: that is what lets the
    compiler vectorise a loop that also stores.
    """

    def codegen(context, builder, signature, args):
        kind = signature.args[0]
        base = context.make_array(kind)(context, builder, args[0]).data
        element = builder.load(builder.gep(base, [args[1]], inbounds=True))
        element.set_metadata("invariant.load", builder.module.add_metadata([]))
        if kind.dtype == types.uint16:  # bfloat16 is the upper half of a float32
            wide = builder.zext(element, ir.IntType(32))
            return builder.bitcast(builder.shl(wide, wide.type(16)), ir.FloatType())
        if kind.dtype == types.int16:
            return builder.fpext(builder.bitcast(element, ir.HalfType()), ir.FloatType())
        if kind.dtype == types.int8:
            return builder.sitofp(element, ir.FloatType())
        if kind.dtype == types.uint8:
            return builder.uitofp(element, ir.FloatType())
        return element

    return types.float32(array, types.intp), codegen


@intrinsic
def _prefetch(typing_context, array, index):
    """Ask for the cache line of an element; never faults."""

    def codegen(context, builder, signature, args):
        base = context.make_array(signature.args[0])(context, builder, args[0]).data
        byte = builder.bitcast(builder.gep(base, [args[1]]), ir.IntType(8).as_pointer())
        i32 = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte.type, i32, i32, i32])
        hint = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(hint, [byte, i32(0), i32(3), i32(1)])  # to read, into all levels, data
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


@compiled
def prefetch_row(flat, offset, dim):
    for d in range(0, dim, 64 // flat.itemsize):
        _prefetch(flat, offset + d)


@intrinsic
def _float_of_bits(typing_context, bits):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@compiled
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


@compiled(fastmath=REORDER)
def dots(q, flat, offsets, count, out):
    """`out[r, t] = q[r] . flat[offsets[t]:]` for all rows `r` of `q` and `t < count <= TILE`.

    Four rows by two keys at a time. An odd count computes its last key twice.
    """
    rows, dim = q.shape
    fours = rows - rows % 4
    if count % 2:
        offsets[count] = offsets[count - 1]
    for t in range(0, count, 2):
        o0, o1 = offsets[t], offsets[t + 1]
        if t + AHEAD + 1 < count:
            prefetch_row(flat, offsets[t + AHEAD], dim)
            prefetch_row(flat, offsets[t + AHEAD + 1], dim)
        for r in range(0, fours, 4):
            s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = np.float32(0.0)
            for d in range(dim):
                x0, x1 = load(flat, o0 + d), load(flat, o1 + d)
                q0, q1 = load(q, r * dim + d), load(q, (r + 1) * dim + d)
                q2, q3 = load(q, (r + 2) * dim + d), load(q, (r + 3) * dim + d)
                s00, s10 = s00 + q0 * x0, s10 + q0 * x1
                s01, s11 = s01 + q1 * x0, s11 + q1 * x1
                s02, s12 = s02 + q2 * x0, s12 + q2 * x1
                s03, s13 = s03 + q3 * x0, s13 + q3 * x1
            out[r, t], out[r + 1, t], out[r + 2, t], out[r + 3, t] = s00, s01, s02, s03
            out[r, t + 1], out[r + 1, t + 1] = s10, s11
            out[r + 2, t + 1], out[r + 3, t + 1] = s12, s13
        for r in range(fours, rows):
            s00 = s10 = np.float32(0.0)
            for d in range(dim):
                q0 = load(q, r * dim + d)
                s00 += q0 * load(flat, o0 + d)
                s10 += q0 * load(flat, o1 + d)
            out[r, t], out[r, t + 1] = s00, s10


@compiled(fastmath=REORDER)
def add_values(weights, count, flat, offsets, acc):
    """`acc[r] += sum over t of weights[r, t] * flat[offsets[t]:]`, `count` a multiple of 4.

    Four rows by four values at a time: every element loaded and widened is used four times.
    """
    rows, dim = acc.shape
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
            for d in range(dim):
                x0, x1, x2, x3 = (
                    load(flat, o0 + d),
                    load(flat, o1 + d),
                    load(flat, o2 + d),
                    load(flat, o3 + d),
                )
                a0[d] += w00 * x0 + w01 * x1 + w02 * x2 + w03 * x3
                a1[d] += w10 * x0 + w11 * x1 + w12 * x2 + w13 * x3
                a2[d] += w20 * x0 + w21 * x1 + w22 * x2 + w23 * x3
                a3[d] += w30 * x0 + w31 * x1 + w32 * x2 + w33 * x3
        for r in range(fours, rows):
            a0 = acc[r]
            w00, w01, w02, w03 = (
                weights[r, t],
                weights[r, t + 1],
                weights[r, t + 2],
                weights[r, t + 3],
            )
            for d in range(dim):
                low = w00 * load(flat, o0 + d) + w01 * load(flat, o1 + d)
                a0[d] += low + w02 * load(flat, o2 + d) + w03 * load(flat, o3 + d)


@compiled
def _largest(rows, r, count):
    """Largest of `rows[r, :count]`, `count` a multiple of 4: four chains hide the latency."""
    m0 = m1 = m2 = m3 = np.float32(-np.inf)
    for t in range(0, count, 4):
        m0, m1 = max(m0, rows[r, t]), max(m1, rows[r, t + 1])
        m2, m3 = max(m2, rows[r, t + 2]), max(m3, rows[r, t + 3])
    return max(max(m0, m1), max(m2, m3))


@compiled(fastmath={"reassoc"})
def _exponentiate(rows, r, count, peak):
    """Row `r` becomes `exp(row - peak)`; returns its sum."""
    for t in range(count):
        rows[r, t] = exp_nonpositive(rows[r, t] - peak)
    mass = np.float32(0.0)
    for t in range(count):
        mass += rows[r, t]
    return mass


@compiled
def log_sum(mass, peak):
    """Logarithm of `mass * exp(peak)`; `-inf` if there is no mass."""
    return np.float32(-np.inf) if mass == 0 else peak + np.float32(math.log(mass))


@compiled
def weigh(logits, count, r, peak, mass, acc):
    """Turn one row of logits into softmax weights under a running maximum."""
    here = _largest(logits, r, count)
    if here > peak[r]:
        shrink = exp_nonpositive(peak[r] - here)
        peak[r] = here
        mass[r] *= shrink
        for d in range(acc.shape[1]):
            acc[r, d] *= shrink
    if peak[r] == -np.inf:
        for t in range(count):  # every key so far is masked, or NaN
            logits[r, t] = np.float32(0.0 if logits[r, t] == -np.inf else np.nan)
            mass[r] += logits[r, t]
    else:
        mass[r] += _exponentiate(logits, r, count, peak[r])


@compiled
def absorb(logits, count, flat, offsets, peak, mass, acc):
    """One step of the online softmax: add `count <= TILE` values with these logits.

    `peak[r]`, `mass[r]`, `acc[r]` hold the running maximum, sum of weights and weighted values.
    `logits` is overwritten; its rows and `offsets` have room for TILE entries.
    """
    padded = (count + 3) // 4 * 4
    for t in range(count, padded):
        offsets[t] = offsets[count - 1]
        logits[:, t] = -np.inf
    for r in range(acc.shape[0]):
        weigh(logits, padded, r, peak, mass, acc)
    add_values(logits, padded, flat, offsets, acc)
