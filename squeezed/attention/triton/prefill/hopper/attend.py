"""The role of the Hopper attention that multiplies and weighs: half of a tile's rows each."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
)

from squeezed.attention import scores
from squeezed.attention.triton.prefill.hopper.classes import (
    DIPOLES,
    ROWS,
    attend_class,
    score_layout,
)
from squeezed.attention.triton.prefill.hopper.stretch import class_part, stretch, tile_part

LOG2E = gl.constexpr(scores.LOG2E)


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
