"""The kernel that walks one level down: select nodes, then score only the children of the kept."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from squeezed.ops.triton.lookup import energy_of, load_nodes, node_logits
from squeezed.ops.triton.selection import (
    attends_to_any,
    keep_bits,
    load_parents,
    members,
    normaliser,
    pick,
    settle,
)
from squeezed.ops.triton.tile import load_query, load_rows, problem, store_partial


@triton.jit
def descend_kernel(
    query, parent_alpha, alpha, logits, parent_offsets, parent_variance, parent_means,
    child_offsets, centroids, key_offsets, variance, means, norm_highs, norm_masses,
    listed, listed_bits, found, found_bits, counters, read_counts, sums, highs, masses,
    estimate_highs, estimate_masses,
    query_stride_batch, query_stride_head, batch, parents, nodes, listed_capacity, found_capacity,
    splits, recent_base, recent_stride, recent_chunks, far_base, far_slots,
    parent_threshold, threshold, scale_bits,
    LISTED: tl.constexpr, FOUND: tl.constexpr, COUNTERS: tl.constexpr, TOP: tl.constexpr,
    FLAT: tl.constexpr, LEAVES: tl.constexpr,
    GROUP: tl.constexpr, TILE_BATCH: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, N_PARENT: tl.constexpr,
    N: tl.constexpr, WRITE: tl.constexpr, NORM_PAD: tl.constexpr, RECENT_PAD: tl.constexpr,
    BITS: tl.constexpr, SHARED: tl.constexpr, SECOND: tl.constexpr, MASKED: tl.constexpr,
    FAR: tl.constexpr, CALIBRATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid `(problems, parts)`. Parents come from the coarsest logits (TOP) or from a list."""
    z, part = tl.program_id(0), tl.program_id(1)
    head, tile = problem(z, TILES)
    row = tl.arange(0, M)
    q, exists = load_query(
        query, query_stride_batch, query_stride_head, head, tile, row, batch,
        GROUP, TILE_BATCH, D, D_PAD,
    )  # fmt: skip
    energy = energy_of(q, alpha, head, row, scale_bits, GROUP, SECOND)
    parent_energy = energy_of(q, parent_alpha, head, row, scale_bits, GROUP, SECOND)
    high = tl.full([M], float("-inf"), tl.float32)
    mass = tl.zeros([M], tl.float32)
    total = tl.zeros([M, D_PAD], tl.float32)
    estimate_high = tl.full([M], float("-inf"), tl.float32)
    estimate = tl.zeros([M], tl.float32)
    read = tl.zeros([M], tl.int32)
    listed += z.to(tl.int64) * listed_capacity
    listed_bits += z.to(tl.int64) * listed_capacity
    found += z.to(tl.int64) * found_capacity
    found_bits += z.to(tl.int64) * found_capacity
    found_counter = counters + z * COUNTERS + FOUND
    parent_means += head.to(tl.int64) * parents * D
    means += head.to(tl.int64) * nodes * D
    stride = tl.num_programs(1) * N_PARENT
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    limit = parents
    if not TOP:
        limit = tl.load(counters + z * COUNTERS + LISTED)
    index = part * N_PARENT + tl.arange(0, N_PARENT)
    parent, alive, start, size, first_child, children, first, spread = load_parents(
        index, limit, z, head, row, exists, logits, listed, listed_bits, parent_offsets,
        child_offsets, parent_variance, parents, BITS, ROWS, M, TOP, FLAT, SHARED, SECOND,
    )  # fmt: skip
    norm = normaliser(norm_highs, norm_masses, z, splits, row, exists, ROWS, M, NORM_PAD)
    selects = exists
    if MASKED:
        recent = recent_base + z * recent_stride
        selects &= attends_to_any(highs, recent, recent_chunks, row, exists, ROWS, RECENT_PAD)
    for _ in range(part * N_PARENT, limit, stride):
        value = tl.zeros([N_PARENT, D_PAD], means.dtype.element_ty)
        if FAR and TOP:
            value = load_rows(parent_means, parent, index < limit, D, D, D_PAD)
        index += stride  # the next block's loads travel while this one is worked on
        parent_, alive_, start_, size_, first_child_, children_, first_, spread_ = load_parents(
            index, limit, z, head, row, exists, logits, listed, listed_bits, parent_offsets,
            child_offsets, parent_variance, parents, BITS, ROWS, M, TOP, FLAT, SHARED, SECOND,
        )  # fmt: skip
        bits = alive
        if TOP:
            score = first + parent_energy[:, None] * spread[None, :] - norm[:, None]
            bits = keep_bits(score, parent_threshold, selects, row, GROUP, TILE_BATCH, BITS)
            high, mass, total, estimate_high, estimate, read = settle(
                high, mass, total, estimate_high, estimate, read, first, parent, start, size,
                bits, bits, tl.full([N_PARENT], -1, BITS), value, found, found_bits, found_counter,
                row, exists, FLAT, True, FAR, CALIBRATED, GROUP, WRITE, SHARED,
            )  # fmt: skip
        if not FLAT:
            count = tl.where(bits != 0, children, 0)
            end = tl.cumsum(count, 0)
            begin = end - count
            for child in range(0, tl.sum(count), N):
                position, member = members(child, begin, end, N)
                node = position + pick(member, first_child - begin)
                live = position < tl.sum(count)
                mean, row_start, length, node_spread = load_nodes(
                    centroids, key_offsets, variance, node, live, head, nodes, D, D_PAD, SECOND
                )
                node_value = mean
                if FAR:
                    node_value = load_rows(means, node, live, D, D, D_PAD)
                inherited = live.to(BITS)
                if SHARED:
                    inherited = pick(member, bits)
                logit = node_logits(q, mean, length, scale_bits)
                estimated = logit + energy[:, None] * node_spread[None, :] - norm[:, None]
                kept = keep_bits(estimated, threshold, selects, row, GROUP, TILE_BATCH, BITS)
                kept &= inherited
                high, mass, total, estimate_high, estimate, read = settle(
                    high, mass, total, estimate_high, estimate, read, logit, node, row_start,
                    length, kept, kept, inherited, node_value, found, found_bits, found_counter,
                    row, exists, True, LEAVES, FAR, CALIBRATED, GROUP, WRITE, SHARED,
                )  # fmt: skip
        parent, alive, start, size = parent_, alive_, start_, size_
        first_child, children, first, spread = first_child_, children_, first_, spread_
    if LEAVES:
        owner = exists & (row % GROUP == 0)
        tl.atomic_add(read_counts + z * TILE_BATCH + row // GROUP, read, mask=owner, sem="relaxed")
    if FAR:
        slot = far_base + z * far_slots + part
        store_partial(sums, highs, masses, slot, row, exists, high, mass, total, ROWS, D, D_PAD)
    if CALIBRATED and LEAVES:
        at = (z * tl.num_programs(1) + part) * ROWS + row
        tl.store(estimate_highs + at, estimate_high, mask=exists)
        tl.store(estimate_masses + at, estimate, mask=exists)
