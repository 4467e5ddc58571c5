"""The kernel that walks one level down: select nodes, then score only the children of the kept."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from squeezed.ops.triton.lookup import energy_of, node_logits, selecting
from squeezed.ops.triton.selection import (
    attends_to_any,
    keep_bits,
    members,
    normaliser,
    pick,
    settle,
)
from squeezed.ops.triton.tile import load_query, problem, store_partial


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
    high = tl.full([M], float("-inf"), tl.float32)
    mass = tl.zeros([M], tl.float32)
    total = tl.zeros([M, D_PAD], tl.float32)
    estimate_high = tl.full([M], float("-inf"), tl.float32)
    estimate = tl.zeros([M], tl.float32)
    read = tl.zeros([M], tl.int32)
    child_means = means + head.to(tl.int64) * nodes * D
    found += z.to(tl.int64) * found_capacity
    found_bits += z.to(tl.int64) * found_capacity
    found_counter = counters + z * COUNTERS + FOUND
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    norm = normaliser(norm_highs, norm_masses, z, splits, row, exists, ROWS, M, NORM_PAD)
    selects = exists
    if MASKED:
        recent = recent_base + z * recent_stride
        selects &= attends_to_any(highs, recent, recent_chunks, row, exists, ROWS, RECENT_PAD)
    limit = parents
    if not TOP:
        limit = tl.load(counters + z * COUNTERS + LISTED)
    for offset in range(part * N_PARENT, limit, tl.num_programs(1) * N_PARENT):
        parent = offset + tl.arange(0, N_PARENT)
        inside = parent < limit
        if TOP:
            at = head * (parents + 1) + parent
            start = tl.load(parent_offsets + at, mask=inside, other=0)
            size = tl.load(parent_offsets + at + 1, mask=inside, other=0) - start
            at_logits = (z * ROWS + row).to(tl.int64)[:, None] * parents + parent[None, :]
            mask = exists[:, None] & inside[None, :]
            first = tl.load(logits + at_logits, mask=mask, other=float("-inf"))
            lift = energy_of(q, parent_alpha, head, row, scale_bits, GROUP, SECOND)
            score = selecting(first, lift, parent_variance + head * parents, parent, inside, SECOND)
            score -= norm[:, None]
            bits = keep_bits(score, parent_threshold, selects, row, GROUP, TILE_BATCH, BITS)
            high, mass, total, estimate_high, estimate, read = settle(
                high, mass, total, estimate_high, estimate, read,
                first, parent, start, size, bits, tl.full([N_PARENT], -1, BITS),
                parent_means + head.to(tl.int64) * parents * D, found, found_bits, found_counter,
                row, exists, FLAT, True, FAR, CALIBRATED, GROUP, D, D_PAD, WRITE, SHARED,
            )  # fmt: skip
        else:
            entry = z.to(tl.int64) * listed_capacity + parent
            parent = tl.load(listed + entry, mask=inside, other=0)
            bits = inside.to(BITS)
            if SHARED:
                bits = tl.load(listed_bits + entry, mask=inside, other=0)
        if not FLAT:
            at = head * (parents + 1) + parent
            first_child = tl.load(child_offsets + at, mask=inside, other=0)
            count = tl.load(child_offsets + at + 1, mask=inside, other=0) - first_child
            count = tl.where(bits != 0, count, 0)
            end = tl.cumsum(count, 0)
            begin = end - count
            children = tl.sum(count)
            for child in range(0, children, N):
                index, member = members(child, begin, end, N)
                node = index + pick(member, first_child - begin)
                logit, begin_row, length = node_logits(
                    q, centroids, key_offsets, node, index < children, head, nodes, scale_bits,
                    D, D_PAD,
                )  # fmt: skip
                estimated = selecting(
                    logit, energy, variance + head * nodes, node, index < children, SECOND
                )
                estimated -= norm[:, None]
                alive = pick(member, bits)
                kept = keep_bits(estimated, threshold, selects, row, GROUP, TILE_BATCH, BITS)
                kept &= alive
                high, mass, total, estimate_high, estimate, read = settle(
                    high, mass, total, estimate_high, estimate, read,
                    logit, node, begin_row, length, kept, alive, child_means,
                    found, found_bits, found_counter, row, exists, True, LEAVES, FAR, CALIBRATED,
                    GROUP, D, D_PAD, WRITE, SHARED,
                )  # fmt: skip
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
