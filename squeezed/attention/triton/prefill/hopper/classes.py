"""Attention of half a tile's rows to one class of its work, unit by unit."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from squeezed.attention import scores

ROWS, CAUSAL_SUFFIX, MASKED_SUFFIX, NODES, DIPOLES = (gl.constexpr(kind) for kind in range(5))
"""Kinds of classes: what a query sees of their units."""
NEG_INF = gl.constexpr(scores.NEG_INF)


@gluon.constexpr_function
def score_layout(block_n):
    """Of the products of queries and keys, `[64, block_n]`, over the warps of one role."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, block_n, 16])


@gluon.jit
def see(
    raw,
    unit,
    scale,
    count,
    row,
    limit,
    mask,
    mask_step,
    energy,
    size_line,
    variance_line,
    BLOCK_N: gl.constexpr,
    KIND: gl.constexpr,
    LAST: gl.constexpr,
):
    """`raw` of one unit with what its class adds, `-inf` where a row sees nothing."""
    columns: gl.constexpr = gl.SliceLayout(0, score_layout(BLOCK_N))
    at = unit * BLOCK_N + gl.arange(0, BLOCK_N, columns)
    if KIND == CAUSAL_SUFFIX:
        raw = gl.where(at[None, :] <= limit[:, None], raw, NEG_INF)
    if KIND == MASKED_SUFFIX:
        bits, row_stride = mask  # [Q, S]
        seen = (at < count)[None, :] & (limit >= 0)[:, None]
        bit = bits + row[:, None].to(gl.int64) * row_stride + at[None, :] * mask_step
        raw = gl.where(gl.load(bit, mask=seen, other=0) != 0, raw, NEG_INF)
    if KIND > MASKED_SUFFIX:
        raw += (size_line.load(columns) * (1 / scale))[None, :]
    if KIND == DIPOLES:
        raw += (energy * (1 / scale))[:, None] * variance_line.load(columns)[None, :]
    if LAST:
        raw = gl.where((at < count)[None, :], raw, NEG_INF)
    return raw


@gluon.jit
def weigh(raw, scale, peak, mass, moved, variance_line, BLOCK_N: gl.constexpr, KIND: gl.constexpr):
    """Weights of one unit in a running softmax, and by how much older weights shrink."""
    new = gl.maximum(peak, gl.max(raw, 1) * scale)
    base = gl.where(new == NEG_INF, 0.0, new)
    weights = gl.exp2(raw * scale - base[:, None])
    shrink = gl.exp2(peak - base)
    mass = mass * shrink + gl.sum(weights, 1)
    if KIND == DIPOLES:
        variance = variance_line.load(gl.SliceLayout(0, score_layout(BLOCK_N)))
        moved = moved * shrink + gl.sum(weights * variance[None, :], 1)
    return weights, shrink, new, mass, moved


@gluon.jit
def attend_class(
    step,
    q,
    acc,
    peak,
    mass,
    moved,
    scale,
    count,
    first,
    last,
    rings,
    row,
    limit,
    mask,
    mask_step,
    energy,
    DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    KIND: gl.constexpr,
):
    """Attend to units `last - 1` to `first` of a class; returns the next step and the state."""
    k_ring, v_ring, size_ring, variance_ring, full, empty = rings
    M: gl.constexpr = q.shape[0]
    out: gl.constexpr = score_layout(DIM)
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=out, k_width=2)
    by_row: gl.constexpr = gl.SliceLayout(1, out)
    if first < last:
        nothing = gl.zeros([M, BLOCK_N], gl.float32, score_layout(BLOCK_N))
        slot = step % STAGES
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        fence_async_shared()
        k = k_ring.index(slot).slice(0, BLOCK_N).permute((1, 0))
        keys_product = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
        raw = warpgroup_mma_wait(0, [keys_product])
        size_line, variance_line = size_ring.index(slot), variance_ring.index(slot)
        raw = see(
            raw,
            last - 1,
            scale,
            count,
            row,
            limit,
            mask,
            mask_step,
            energy,
            size_line,
            variance_line,
            BLOCK_N,
            KIND,
            True,
        )
        weights, shrink, peak, mass, moved = weigh(
            raw, scale, peak, mass, moved, variance_line, BLOCK_N, KIND
        )
        mbarrier.arrive(empty.index(slot), count=1)
        acc = acc * gl.convert_layout(shrink, by_row)[:, None]
        p = gl.convert_layout(weights.to(q.dtype), operand)
        mbarrier.wait(full.index((step + 1) % STAGES), ((step + 1) // STAGES) & 1)
        for i in range(1, last - first):
            slot = (step + i) % STAGES
            fence_async_shared()
            k = k_ring.index(slot).slice(0, BLOCK_N).permute((1, 0))
            v = v_ring.index(slot).slice(0, BLOCK_N)
            keys_product = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
            values_product = warpgroup_mma(p, v, acc, is_async=True)
            raw = warpgroup_mma_wait(1, [keys_product])
            size_line, variance_line = size_ring.index(slot), variance_ring.index(slot)
            raw = see(
                raw,
                last - 1 - i,
                scale,
                count,
                row,
                limit,
                mask,
                mask_step,
                energy,
                size_line,
                variance_line,
                BLOCK_N,
                KIND,
                False,
            )
            weights, shrink, peak, mass, moved = weigh(
                raw, scale, peak, mass, moved, variance_line, BLOCK_N, KIND
            )
            fresh = gl.convert_layout(weights.to(q.dtype), operand)
            # Wait for the next unit here, not above: without a branch between them, the assembler
            # moves the wait for the values' product before the weights, and nothing overlaps.
            mbarrier.wait(full.index((step + i + 1) % STAGES), ((step + i + 1) // STAGES) & 1)
            acc, p = warpgroup_mma_wait(0, [values_product, p])
            mbarrier.arrive(empty.index(slot), count=1)
            acc = acc * gl.convert_layout(shrink, by_row)[:, None]
            p = fresh
        step += last - first
        slot = step % STAGES
        fence_async_shared()
        v = v_ring.index(slot).slice(0, BLOCK_N)
        acc = warpgroup_mma_wait(0, [warpgroup_mma(p, v, acc, is_async=True)])
        mbarrier.arrive(empty.index(slot), count=1)
        step += 1
    return step, acc, peak, mass, moved
