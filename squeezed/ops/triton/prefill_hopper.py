"""Attention of query blocks to lists of rows, for Hopper GPUs: the work of `prefill_attention`.

The same arguments, stretches and parts, but a program's warps have roles, as in FlashAttention-3
(arXiv 2407.08608): four warps gather keys and values into a ring in shared memory, and two
warpgroups of four attend with 64 query rows each, so that one computes weights while the other
multiplies. Step `i` of a class of work holds the keys of unit `i` and the values of unit `i - 1`:
the products of both run while the weights of unit `i` are computed. A class's units go from the
last, which may be partial, to the first.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from squeezed.ops.triton import gpus

SHAPE = {"rows": 128, "keys": 128, "others": 64, "warps": 4, "stages": 3, "programs": 1}
"""Of the tile, in the words of `prefill_work.Tile`: what registers and shared memory hold."""
# Kinds of classes: what a query sees of their units.
ROWS, CAUSAL, MASKED, NODES, DIPOLES = (gl.constexpr(kind) for kind in range(5))
ROLE = gl.constexpr(4)  # warps
GATHERERS = gl.constexpr(128)  # threads
ATTENDER_REGISTERS, GATHERER_REGISTERS = gl.constexpr(224), gl.constexpr(56)
NEG_INF = gl.constexpr(float("-inf"))
LOG2E = gl.constexpr(1.4426950408889634)


def fits(query: Tensor, rows: int, dim: int) -> bool:
    """Whether this kernel can run for tiles of `rows` query rows: enough of them, in 16 bits."""
    shaped = rows >= SHAPE["rows"] and dim in (64, 128) and query.element_size() == 2
    return shaped and gpus.of(query.device).generation == gpus.HOPPER


def aligned(x: Tensor) -> Tensor:
    """`x` with rows that can be copied 16 bytes at a time: as it is, as a rule."""
    strides = [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]
    fine = x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in strides[:-1])
    return x if fine else x.contiguous().clone()


@gluon.jit
def stretch(ends, tiles, pass_tiles, number, STEP: gl.constexpr):
    """Tiles `first:stop` and units `begin:end` of this program in a pass."""
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [ROLE], [0])
    pid, programs = gl.program_id(0), gl.num_programs(0)
    w_first = number * pass_tiles
    w_last = gl.minimum(w_first + pass_tiles, tiles)
    base = gl.load(ends + w_first - 1, mask=w_first > 0, other=0)
    line = gl.load(ends + w_last - 1)
    share = gl.maximum(gl.cdiv(line - base, programs), 1)
    begin = gl.minimum(base + pid * share, line)
    end = gl.minimum(begin + share, line)
    first, stop = w_first, w_first
    for at in range(w_first, w_last, STEP):
        w = at + gl.arange(0, STEP, flat)
        tile_end = gl.load(ends + w, mask=w < w_last, other=2147483647)
        first += gl.sum((tile_end <= begin).to(gl.int32), 0)
        stop += gl.sum((tile_end < end).to(gl.int32), 0)
    return first, gl.where(begin < end, stop + 1, first), begin, end


@gluon.jit
def tile_part(ends, bounds, w, begin, end, CLASSES: gl.constexpr):
    """Units `first:last` of tile `w` inside `begin:end` of the line, from the tile's start."""
    tile_end = gl.load(ends + w)
    start = tile_end - gl.load(bounds + w * CLASSES + CLASSES - 1)
    return gl.maximum(begin - start, 0), gl.minimum(end, tile_end) - start


@gluon.jit
def class_part(first, last, start, end):
    """The part of units `first:last` of a tile inside a class, from the class's start."""
    return gl.maximum(first, start) - start, gl.minimum(last, end) - start


@gluon.jit
def rows_of(list_, unit, first, count, BLOCK_N: gl.constexpr, LISTED: gl.constexpr,
            lane: gl.constexpr):  # fmt: skip
    """Row numbers of a unit, those beyond `count` and of units before `first` being any."""
    row = gl.maximum(unit, first) * BLOCK_N + gl.arange(0, BLOCK_N, lane)
    inside = row < count
    if LISTED:
        return gl.load(list_ + row, mask=inside, other=0)
    else:
        return gl.where(inside, row, 0)


@gluon.jit
def fetch(place, base, row, row_stride, DIM: gl.constexpr, gather: gl.constexpr):
    """Start to copy rows of `DIM` numbers to shared memory."""
    dims = gl.arange(0, DIM, gl.SliceLayout(0, gather))
    source = base + row[:, None].to(gl.int64) * row_stride + dims[None, :]
    async_copy.async_copy_global_to_shared(place, source)


@gluon.jit
def fetch_line(place, line, unit, count, BLOCK_N: gl.constexpr):
    """Start to copy one number per node of a unit."""
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [ROLE], [0])
    at = unit * BLOCK_N + gl.arange(0, BLOCK_N, flat)
    async_copy.async_copy_global_to_shared(place, line + at, mask=at < count)


@gluon.jit
def gather_class(
    step, keys, k_s, values, v_s, list_, masses, variances, count, first, last,
    k_ring, v_ring, mass_ring, variance_ring, full, empty,
    DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, LISTED: gl.constexpr,
    MASSIVE: gl.constexpr, DIPOLE: gl.constexpr,
):  # fmt: skip
    """Feed the rows of units `last - 1` to `first` to the ring; returns the next step."""
    gather: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [ROLE, 1], [1, 0])
    lane: gl.constexpr = gl.SliceLayout(1, gather)
    if first < last:
        for i in range(0, last - first + 1):
            slot, turn = (step + i) % STAGES, (step + i) // STAGES
            row = rows_of(list_, last - 1 - i, first, count, BLOCK_N, LISTED, lane)
            older = rows_of(list_, last - i, first, count, BLOCK_N, LISTED, lane)
            mbarrier.wait(empty.index(slot), (turn & 1) ^ 1)
            if i < last - first:
                fetch(k_ring.index(slot).slice(0, BLOCK_N), keys, row, k_s, DIM, gather)
                if MASSIVE:
                    fetch_line(mass_ring.index(slot), masses, last - 1 - i, count, BLOCK_N)
                if DIPOLE:
                    fetch_line(variance_ring.index(slot), variances, last - 1 - i, count, BLOCK_N)
            if i > 0:
                fetch(v_ring.index(slot).slice(0, BLOCK_N), values, older, v_s, DIM, gather)
            async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
        step += last - first + 1
    return step


@gluon.jit
def gatherer(
    keys, values, tokens, suffix_keys, k_b, k_h, k_s, suffix_values, v_b, v_h, v_s,
    ends, bounds, row_list, row_count, centroids, mean_values, nodes, dropped, masses, variances,
    dropped_counts, spans, blocks, suffix, capacity, pass_tiles,
    k_ring, v_ring, mass_ring, variance_ring, full, empty,
    HEADS_KV: gl.constexpr, DIM: gl.constexpr, BLOCK_N: gl.constexpr, OTHER_N: gl.constexpr,
    SPLIT_M: gl.constexpr, STAGES: gl.constexpr, LEVELS: gl.constexpr, CLASSES: gl.constexpr,
    DIPOLE: gl.constexpr, STEP: gl.constexpr,
):  # fmt: skip
    """The warps that copy: every class of every tile, in the order in which it is attended to."""
    step = gl.to_tensor(0)
    for number in range(0, gl.cdiv(spans, pass_tiles)):
        w_first, w_stop, begin, end = stretch(ends, spans, pass_tiles, number, STEP)
        for w in range(w_first, w_stop):
            t = w // SPLIT_M
            wide = t.to(gl.int64)
            h = ((t // blocks) % HEADS_KV).to(gl.int64)
            b = (t // blocks // HEADS_KV).to(gl.int64)
            lo, hi = tile_part(ends, bounds, w, begin, end, CLASSES)
            class_end = gl.load(bounds + w * CLASSES)
            first, last = class_part(lo, hi, 0, class_end)
            step = gather_class(
                step, keys + h * tokens * DIM, DIM, values + h * tokens * DIM, DIM,
                row_list + wide * capacity, ends, ends, gl.load(row_count + t), first, last,
                k_ring, v_ring, mass_ring, variance_ring, full, empty,
                DIM, BLOCK_N, STAGES, True, False, False,
            )  # fmt: skip
            start = class_end
            class_end = gl.load(bounds + w * CLASSES + 1)
            first, last = class_part(lo, hi, start, class_end)
            step = gather_class(
                step, suffix_keys + b * k_b + h * k_h, k_s, suffix_values + b * v_b + h * v_h, v_s,
                row_list, ends, ends, suffix, first, last,
                k_ring, v_ring, mass_ring, variance_ring, full, empty,
                DIM, OTHER_N, STAGES, False, False, False,
            )  # fmt: skip
            for level in gl.static_range(LEVELS):
                head, line = h * nodes[level] * DIM, wide * nodes[level]
                start = class_end
                class_end = gl.load(bounds + w * CLASSES + 2 + level)
                first, last = class_part(lo, hi, start, class_end)
                step = gather_class(
                    step, centroids[level] + head, DIM, mean_values[level] + head, DIM,
                    dropped[level] + line, masses[level] + line, variances[level] + line,
                    gl.load(dropped_counts[level] + t), first, last,
                    k_ring, v_ring, mass_ring, variance_ring, full, empty,
                    DIM, OTHER_N, STAGES, True, True, DIPOLE,
                )  # fmt: skip


@gluon.constexpr_function
def score_layout(block_n):
    """Of the products of queries and keys, `[64, block_n]`, over the warps of one role."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, block_n, 16])


@gluon.jit
def see(
    raw, unit, scale, count, row, limit, mask, m_q, m_s, energy, mass_line, variance_line,
    BLOCK_N: gl.constexpr, KIND: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    """`raw` of one unit with what its class adds, `-inf` where a row sees nothing."""
    columns: gl.constexpr = gl.SliceLayout(0, score_layout(BLOCK_N))
    at = unit * BLOCK_N + gl.arange(0, BLOCK_N, columns)
    if KIND == CAUSAL:
        raw = gl.where(at[None, :] <= limit[:, None], raw, NEG_INF)
    if KIND == MASKED:
        seen = (at < count)[None, :] & (limit >= 0)[:, None]
        bit = mask + row[:, None].to(gl.int64) * m_q + at[None, :] * m_s
        raw = gl.where(gl.load(bit, mask=seen, other=0) != 0, raw, NEG_INF)
    if KIND > MASKED:
        raw += (mass_line.load(columns) * (1 / scale))[None, :]
    if KIND == DIPOLES:
        raw += (energy * (1 / scale))[:, None] * variance_line.load(columns)[None, :]
    if LAST:
        raw = gl.where((at < count)[None, :], raw, NEG_INF)
    return raw


@gluon.jit
def weigh(raw, scale, peak, total, moved, variance_line, BLOCK_N: gl.constexpr,
          KIND: gl.constexpr):  # fmt: skip
    """Weights of one unit in a running softmax, and by how much older weights shrink."""
    top = gl.maximum(peak, gl.max(raw, 1) * scale)
    base = gl.where(top == NEG_INF, 0.0, top)
    weights = gl.exp2(raw * scale - base[:, None])
    shrink = gl.exp2(peak - base)
    total = total * shrink + gl.sum(weights, 1)
    if KIND == DIPOLES:
        variance = variance_line.load(gl.SliceLayout(0, score_layout(BLOCK_N)))
        moved = moved * shrink + gl.sum(weights * variance[None, :], 1)
    return weights, shrink, top, total, moved


@gluon.jit
def attend_class(
    step, q, acc, peak, total, moved, scale, count, first, last,
    k_ring, v_ring, mass_ring, variance_ring, full, empty,
    row, limit, mask, m_q, m_s, energy,
    DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    """Attend to units `last - 1` to `first` of a class; returns the next step and the state."""
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
        mass_line, variance_line = mass_ring.index(slot), variance_ring.index(slot)
        raw = see(
            raw, last - 1, scale, count, row, limit, mask, m_q, m_s, energy, mass_line,
            variance_line, BLOCK_N, KIND, True,
        )  # fmt: skip
        weights, shrink, peak, total, moved = weigh(
            raw, scale, peak, total, moved, variance_line, BLOCK_N, KIND
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
            mass_line, variance_line = mass_ring.index(slot), variance_ring.index(slot)
            raw = see(
                raw, last - 1 - i, scale, count, row, limit, mask, m_q, m_s, energy, mass_line,
                variance_line, BLOCK_N, KIND, False,
            )  # fmt: skip
            weights, shrink, peak, total, moved = weigh(
                raw, scale, peak, total, moved, variance_line, BLOCK_N, KIND
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
    return step, acc, peak, total, moved


@gluon.jit
def attender(
    query, q_b, q_h, q_r, mask, m_b, m_q, m_s, ends, bounds, row_count, dropped_counts, far_alpha,
    part, part_lse, part_moved, spans, blocks, rows, suffix, pass_tiles, scale,
    q_smem, k_ring, v_ring, mass_ring, variance_ring, full, empty,
    HALF: gl.constexpr, HEADS_KV: gl.constexpr, GROUP: gl.constexpr, BLOCK: gl.constexpr,
    DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, OTHER_N: gl.constexpr,
    SPLIT_M: gl.constexpr, STAGES: gl.constexpr, LEVELS: gl.constexpr, CLASSES: gl.constexpr,
    SUFFIX: gl.constexpr, FAR: gl.constexpr, STEP: gl.constexpr,
):  # fmt: skip
    """The warps that attend with half of the query rows of every tile."""
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
            q_rows = b * q_b + (h * GROUP + m // BLOCK) * q_h + row.to(gl.int64) * q_r
            dims = gl.arange(0, DIM, gl.SliceLayout(0, coalesced))
            q = gl.load(query + q_rows[:, None] + dims[None, :], mask=ok[:, None], other=0.0)
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
            total = gl.zeros([M], gl.float32, by_row)
            first, last = class_part(lo, hi, 0, class_end)
            step, acc, peak, total, moved = attend_class(
                step, q_mine, acc, peak, total, moved, scale, count, first, last,
                k_ring, v_ring, mass_ring, variance_ring, full, empty,
                row, limit, mask, m_q, m_s, energy, DIM, BLOCK_N, STAGES, ROWS,
            )  # fmt: skip
            peak, total = gl.convert_layout(peak, by_other), gl.convert_layout(total, by_other)
            start = class_end
            class_end = gl.load(bounds + w * CLASSES + 1)
            first, last = class_part(lo, hi, start, class_end)
            step, acc, peak, total, moved = attend_class(
                step, q_mine, acc, peak, total, moved, scale, suffix, first, last,
                k_ring, v_ring, mass_ring, variance_ring, full, empty,
                row, limit, mask + b * m_b, m_q, m_s, energy, DIM, OTHER_N, STAGES, SUFFIX,
            )  # fmt: skip
            for level in gl.static_range(LEVELS):
                start = class_end
                class_end = gl.load(bounds + w * CLASSES + 2 + level)
                count = gl.load(dropped_counts[level] + t)
                first, last = class_part(lo, hi, start, class_end)
                step, acc, peak, total, moved = attend_class(
                    step, q_mine, acc, peak, total, moved, scale, count, first, last,
                    k_ring, v_ring, mass_ring, variance_ring, full, empty,
                    row, limit, mask, m_q, m_s, energy, DIM, OTHER_N, STAGES, FAR,
                )  # fmt: skip
            mass = gl.where(total > 0, total, 1.0)
            acc = acc / gl.convert_layout(mass, by_out)[:, None]
            slots = (number * programs + pid + w).to(gl.int64) * BLOCK_M + HALF * M
            dims = gl.arange(0, DIM, gl.SliceLayout(0, out))
            at = slots + gl.arange(0, M, by_out)
            gl.store(part + at[:, None] * DIM + dims[None, :], acc)
            at = slots + gl.arange(0, M, by_other)
            gl.store(part_lse + at, peak + gl.log2(total))
            if FAR == DIPOLES:
                gl.store(part_moved + at, moved / mass)


@gluon.jit(
    do_not_specialize=[
        "tokens",
        "m_b",
        "m_q",
        "tiles",
        "blocks",
        "rows",
        "suffix",
        "capacity",
        "pass_tiles",
    ]
)
def hopper_attention_kernel(
    query, q_b, q_h, q_r, keys, values, tokens, suffix_keys, k_b, k_h, k_s,
    suffix_values, v_b, v_h, v_s, mask, m_b, m_q, m_s,
    ends, bounds, row_list, row_count, centroids, mean_values, nodes, dropped, masses, variances,
    dropped_counts, far_alpha, part, part_lse, part_moved,
    tiles, blocks, rows, suffix, capacity, pass_tiles, scale,
    HEADS_KV: gl.constexpr, GROUP: gl.constexpr, BLOCK: gl.constexpr, DIM: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, OTHER_N: gl.constexpr, SPLIT_M: gl.constexpr,
    LEVELS: gl.constexpr, CLASSES: gl.constexpr, DIPOLE: gl.constexpr, CAUSAL: gl.constexpr,
    STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One program's stretches of the line of units, one in every pass."""
    dtype: gl.constexpr = query.dtype.element_ty
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, DIM], dtype)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_smem = gl.allocate_shared_memory(dtype, [2, BLOCK_M // 2, DIM], shared)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DIM], shared)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DIM], shared)
    mass_ring = gl.allocate_shared_memory(gl.float32, [STAGES, OTHER_N], line)
    variance_ring = gl.allocate_shared_memory(gl.float32, [STAGES, OTHER_N], line)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=GATHERERS)
        mbarrier.init(empty.index(i), count=2)
    spans = tiles * SPLIT_M
    SUFFIX: gl.constexpr = 1 if CAUSAL else 2
    FAR: gl.constexpr = 4 if DIPOLE else 3
    gl.warp_specialize(
        [
            (attender, (
                query, q_b, q_h, q_r, mask, m_b, m_q, m_s, ends, bounds, row_count, dropped_counts,
                far_alpha, part, part_lse, part_moved, spans, blocks, rows, suffix, pass_tiles,
                scale, q_smem, k_ring, v_ring, mass_ring, variance_ring, full, empty,
                0, HEADS_KV, GROUP, BLOCK, DIM, BLOCK_M, BLOCK_N, OTHER_N, SPLIT_M, STAGES, LEVELS,
                CLASSES, SUFFIX, FAR, STEP,
            )),
            (attender, (
                query, q_b, q_h, q_r, mask, m_b, m_q, m_s, ends, bounds, row_count, dropped_counts,
                far_alpha, part, part_lse, part_moved, spans, blocks, rows, suffix, pass_tiles,
                scale, q_smem, k_ring, v_ring, mass_ring, variance_ring, full, empty,
                1, HEADS_KV, GROUP, BLOCK, DIM, BLOCK_M, BLOCK_N, OTHER_N, SPLIT_M, STAGES, LEVELS,
                CLASSES, SUFFIX, FAR, STEP,
            )),
            (gatherer, (
                keys, values, tokens, suffix_keys, k_b, k_h, k_s, suffix_values, v_b, v_h, v_s,
                ends, bounds, row_list, row_count, centroids, mean_values, nodes, dropped, masses,
                variances, dropped_counts, spans, blocks, suffix, capacity, pass_tiles,
                k_ring, v_ring, mass_ring, variance_ring, full, empty,
                HEADS_KV, DIM, BLOCK_N, OTHER_N, SPLIT_M, STAGES, LEVELS, CLASSES, DIPOLE, STEP,
            )),
        ],
        [4, 4], [ATTENDER_REGISTERS, GATHERER_REGISTERS],
    )  # fmt: skip
