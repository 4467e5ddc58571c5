"""The role of the Hopper attention that multiplies and weighs: half of a tile's rows each."""

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
from squeezed.attention.triton.prefill.hopper.stretch import class_part, stretch, tile_part

ROWS, CAUSAL_SUFFIX, MASKED_SUFFIX, NODES, DIPOLES = (gl.constexpr(kind) for kind in range(5))
"""Kinds of classes: what a query sees of their units."""
NEG_INF = gl.constexpr(scores.NEG_INF)
LOG2E = gl.constexpr(scores.LOG2E)


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


@gluon.jit
def attender(
    query,
    mask,
    mask_step,
    plan,
    row_count,
    dropped_counts,
    far_alpha,
    partials,
    spans,
    blocks,
    rows,
    suffix,
    pass_tiles,
    scale,
    q_smem,
    rings,
    HALF: gl.constexpr,
    HEADS_KV: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK: gl.constexpr,
    DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    OTHER_N: gl.constexpr,
    SPLIT_M: gl.constexpr,
    STAGES: gl.constexpr,
    LEVELS: gl.constexpr,
    CLASSES: gl.constexpr,
    SUFFIX: gl.constexpr,
    FAR: gl.constexpr,
    STEP: gl.constexpr,
):
    """The warps that attend with half of the query rows of every tile."""
    queries, batch_stride, head_stride, row_stride = query  # [B, Hq, Q, D]
    bits, mask_batch_stride, mask_row_stride = mask  # [B, 1, Q, S]
    all_bits = bits, mask_row_stride
    ends, bounds = plan  # [W], [W, CLASSES]
    outputs, log_masses, part_moved = partials  # [slots, BLOCK_M, DIM], [slots, BLOCK_M] twice
    M: gl.constexpr = BLOCK_M // 2
    coalesced: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    by_row: gl.constexpr = gl.SliceLayout(1, score_layout(BLOCK_N))
    out: gl.constexpr = score_layout(DIM)
    by_out: gl.constexpr = gl.SliceLayout(1, out)
    by_other: gl.constexpr = gl.SliceLayout(1, score_layout(OTHER_N))
    q_mine = q_smem.index(HALF)
    pid, programs = gl.program_id(0), gl.num_programs(0)
    step = gl.to_tensor(0)
    for number in range(0, gl.cdiv(spans, pass_tiles)):
        w_first, w_stop, begin, end = stretch(ends, spans, pass_tiles, number, STEP)
        for w in range(w_first, w_stop):
            t = w // SPLIT_M
            h = ((t // blocks) % HEADS_KV).to(gl.int64)
            b = (t // blocks // HEADS_KV).to(gl.int64)
            lo, hi = tile_part(ends, bounds, w, begin, end, CLASSES)
            class_end = gl.load(bounds + w * CLASSES)
            count = gl.load(row_count + t)
            member = (w % SPLIT_M) * BLOCK_M + HALF * M
            m = member + gl.arange(0, M, gl.SliceLayout(1, coalesced))
            row = rows - (blocks - t % blocks) * BLOCK + m % BLOCK
            ok = (m < GROUP * BLOCK) & (row >= 0)
            q_rows = b * batch_stride + (h * GROUP + m // BLOCK) * head_stride
            q_rows += row.to(gl.int64) * row_stride
            dims = gl.arange(0, DIM, gl.SliceLayout(0, coalesced))
            q = gl.load(queries + q_rows[:, None] + dims[None, :], mask=ok[:, None], other=0.0)
            q_mine.store(q)
            fence_async_shared()
            moved = gl.zeros([M], gl.float32, by_other)
            energy = moved
            if FAR == DIPOLES:
                alpha = gl.load(far_alpha + h * GROUP + m // BLOCK, mask=ok, other=0.0)
                wide_q = q.to(gl.float32)
                energy = 0.5 * alpha * scale * (scale / LOG2E) * gl.sum(wide_q * wide_q, 1)
                energy = gl.convert_layout(energy, by_other)
            m = member + gl.arange(0, M, by_other)
            row = rows - (blocks - t % blocks) * BLOCK + m % BLOCK
            limit = gl.minimum(row + (suffix - rows), suffix - 1)  # the last token a row sees
            limit = gl.where((m < GROUP * BLOCK) & (row >= 0), limit, -1)
            acc = gl.zeros([M, DIM], gl.float32, out)
            peak = gl.full([M], float("-inf"), gl.float32, by_row)
            mass = gl.zeros([M], gl.float32, by_row)
            first, last = class_part(lo, hi, 0, class_end)
            step, acc, peak, mass, moved = attend_class(
                step,
                q_mine,
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
                all_bits,
                mask_step,
                energy,
                DIM,
                BLOCK_N,
                STAGES,
                ROWS,
            )
            peak, mass = gl.convert_layout(peak, by_other), gl.convert_layout(mass, by_other)
            start = class_end
            class_end = gl.load(bounds + w * CLASSES + 1)
            first, last = class_part(lo, hi, start, class_end)
            step, acc, peak, mass, moved = attend_class(
                step,
                q_mine,
                acc,
                peak,
                mass,
                moved,
                scale,
                suffix,
                first,
                last,
                rings,
                row,
                limit,
                (bits + b * mask_batch_stride, mask_row_stride),
                mask_step,
                energy,
                DIM,
                OTHER_N,
                STAGES,
                SUFFIX,
            )
            for level in gl.static_range(LEVELS):
                start = class_end
                class_end = gl.load(bounds + w * CLASSES + 2 + level)
                count = gl.load(dropped_counts[level] + t)
                first, last = class_part(lo, hi, start, class_end)
                step, acc, peak, mass, moved = attend_class(
                    step,
                    q_mine,
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
                    all_bits,
                    mask_step,
                    energy,
                    DIM,
                    OTHER_N,
                    STAGES,
                    FAR,
                )
            norm = gl.where(mass > 0, mass, 1.0)
            acc = acc / gl.convert_layout(norm, by_out)[:, None]
            slots = (number * programs + pid + w).to(gl.int64) * BLOCK_M + HALF * M
            dims = gl.arange(0, DIM, gl.SliceLayout(0, out))
            at = slots + gl.arange(0, M, by_out)
            gl.store(outputs + at[:, None] * DIM + dims[None, :], acc)
            at = slots + gl.arange(0, M, by_other)
            gl.store(log_masses + at, peak + gl.log2(mass))
            if FAR == DIPOLES:
                gl.store(part_moved + at, moved / norm)
