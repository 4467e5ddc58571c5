"""The kernel that walks one level down the tree.

A program takes a few neighbouring nodes, the parents: it selects among them, scores the children
of the kept ones and selects again. What is kept goes to a list: of nodes, from which the next
launch takes its parents, or at the leaves of the rows to attend. Dropped nodes join the far field.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from squeezed.ops.triton.lookup import LOG2_E, energy_of, load_nodes, node_logits
from squeezed.ops.triton.selection import (
    append,
    append_runs,
    attends_to_any,
    keep_bits,
    log_mass,
    members,
    normaliser,
    pick,
    spread,
)
from squeezed.ops.triton.tile import (
    fold,
    fold_mass,
    load_query,
    load_rows,
    problem,
    store_partial,
)


@triton.jit
def nth_children(child, first_child, count, N: tl.constexpr):
    """Children `[child, child + N)` of a block of parents, and which of them exist."""
    end = tl.cumsum(count, 0)
    begin = end - count
    position, member = members(child, begin, end, N)
    return position + pick(member, first_child - begin), position < tl.sum(count)


@triton.jit
def score_nodes(
    q, node, live, centroids, key_offsets, variance, head, nodes, scale_bits,
    D: tl.constexpr, D_PAD: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """First row, size and variance of nodes `[N]`, and their first-order logits `[M, N]`."""
    mean, start, size, variances = load_nodes(
        centroids, key_offsets, variance, node, live, head, nodes, D, D_PAD, SECOND
    )
    return start, size, variances, node_logits(q, mean, size, scale_bits)


@triton.jit
def fold_nodes(high, mass, total, bits, first, size, value, row, exists, GROUP: tl.constexpr):
    """Fold mean values `[N, D_PAD]` into an online softmax, for the requests in `bits`."""
    wanted = spread(bits, row, GROUP) & exists[:, None]
    logits = tl.where(wanted, log_mass(first, size), float("-inf"))
    return fold(high, mass, total, logits, value)


@triton.jit
def descend_kernel(
    query, parent_alpha, alpha,
    parent_centroids, parent_offsets, parent_variance, parent_means, child_offsets,
    centroids, key_offsets, variance, means, norm_highs, norm_masses,
    listed, listed_bits, found, found_bits, counters, read_counts, sums, highs, masses,
    estimate_highs, estimate_masses,
    query_stride_batch, query_stride_head, batch, parents, nodes, share,
    listed_capacity, found_capacity, splits, recent_base, recent_stride, recent_chunks,
    far_base, far_slots, parent_thresholds, thresholds, scale_bits,
    LISTED: tl.constexpr, FOUND: tl.constexpr, COUNTERS: tl.constexpr, TOP: tl.constexpr,
    FLAT: tl.constexpr, LEAVES: tl.constexpr, EAGER: tl.constexpr,
    GROUP: tl.constexpr, TILE_BATCH: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, N_PARENT: tl.constexpr,
    N: tl.constexpr, WRITE: tl.constexpr, NORM_PAD: tl.constexpr,
    ROWS_PAD: tl.constexpr, NORM_STEP: tl.constexpr, RECENT_PAD: tl.constexpr,
    BITS: tl.constexpr, SHARED: tl.constexpr,
    SECOND: tl.constexpr, MASKED: tl.constexpr, FAR: tl.constexpr, CALIBRATED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid `(problems, parts)`; a part is `share` parents, or FLAT: leaves of a tree of one level.

    TOP: parents are nodes of the coarsest level, which are selected here; else they come from a
    list. EAGER: children are scored before it is known whose parents are kept, while the kernel
    before is still running.
    """
    z, part = tl.program_id(0), tl.program_id(1)
    parts = tl.num_programs(1)
    head, tile = problem(z, TILES)
    row = tl.arange(0, M)
    q, exists = load_query(
        query, query_stride_batch, query_stride_head, head, tile, row, batch,
        GROUP, TILE_BATCH, D, D_PAD,
    )  # fmt: skip
    energy = energy_of(q, alpha, head, row, scale_bits, GROUP, SECOND)
    parent_threshold = tl.load(parent_thresholds + head) * LOG2_E
    threshold = tl.load(thresholds + head) * LOG2_E
    found += z.to(tl.int64) * found_capacity
    found_bits += z.to(tl.int64) * found_capacity
    counter = counters + z * COUNTERS + FOUND
    means += head.to(tl.int64) * nodes * D
    high = tl.full([M], float("-inf"), tl.float32)
    mass = tl.zeros([M], tl.float32)
    total = tl.zeros([M, D_PAD], tl.float32)
    estimate_high, estimate, read = high, mass, tl.zeros([M], tl.int32)

    slot = tl.arange(0, N_PARENT)
    scored = tl.arange(0, N)
    limit = parents
    if TOP:
        index = part * share + slot
        inside = (slot < share) & (index < parents)
        after = tl.minimum(part * share + share, parents)
        node, stop_child = part * share + scored, after
        if not FLAT:
            at = child_offsets + head * (parents + 1)
            node = tl.load(at + part * share) + scored
            stop_child = tl.load(at + after)
            first_child = tl.load(at + index, mask=inside, other=0)
            children = tl.load(at + index + 1, mask=inside, other=0) - first_child
            mean, _start, size, parent_variances = load_nodes(
                parent_centroids, parent_offsets, parent_variance, index, inside, head, parents,
                D, D_PAD, SECOND,
            )  # fmt: skip
            if FAR:
                base = parent_means + head.to(tl.int64) * parents * D
                value = load_rows(base, index, inside, D, D, D_PAD)
        if EAGER:
            live = node < stop_child
            start, length, variances, logit = score_nodes(
                q, node, live, centroids, key_offsets, variance, head, nodes, scale_bits,
                D, D_PAD, SECOND,
            )  # fmt: skip
        if not FLAT:
            first = node_logits(q, mean, size, scale_bits)
            score = first
            if SECOND:
                parent_energy = energy_of(q, parent_alpha, head, row, scale_bits, GROUP, SECOND)
                score += parent_energy[:, None] * parent_variances[None, :]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    norm = normaliser(norm_highs, norm_masses, z, splits, row, ROWS, ROWS_PAD, NORM_PAD, NORM_STEP)
    selects = exists
    if MASKED:
        recent = recent_base + z * recent_stride
        selects &= attends_to_any(highs, recent, recent_chunks, row, exists, ROWS, RECENT_PAD)
    if not TOP:
        limit = tl.load(counters + z * COUNTERS + LISTED)
    stop = limit
    if TOP:
        stop = tl.minimum(limit, part * share + 1)  # one block
    for block in range(part * share, stop, parts * share):
        if not TOP:
            index = block + slot
            inside = (slot < share) & (index < limit)
            entry = z.to(tl.int64) * listed_capacity + index
            parent = tl.load(listed + entry, mask=inside, other=0)
            bits = inside.to(BITS)
            if SHARED:
                bits = tl.load(listed_bits + entry, mask=inside, other=0)
            at = child_offsets + head * (parents + 1) + parent
            first_child = tl.load(at, mask=inside, other=0)
            children = tl.load(at + 1, mask=inside, other=0) - first_child
        elif not FLAT:
            bits = keep_bits(
                score - norm[:, None], parent_threshold, selects, row, GROUP, TILE_BATCH, BITS
            )
            if FAR:
                high, mass, total = fold_nodes(
                    high, mass, total, tl.where(inside, ~bits, 0), first, size, value, row, exists,
                    GROUP,
                )  # fmt: skip
        if FLAT:
            candidates = stop_child - part * share
        else:
            count = children
            if not EAGER:
                count = tl.where(bits != 0, children, 0)
                node, live = nth_children(0, first_child, count, N)
                start, length, variances, logit = score_nodes(
                    q, node, live, centroids, key_offsets, variance, head, nodes, scale_bits,
                    D, D_PAD, SECOND,
                )  # fmt: skip
            candidates = tl.sum(count)
        for child in range(0, candidates, N):
            if child > 0:
                if EAGER:
                    node += N
                    live = node < stop_child
                else:
                    node, live = nth_children(child, first_child, count, N)
                start, length, variances, logit = score_nodes(
                    q, node, live, centroids, key_offsets, variance, head, nodes, scale_bits,
                    D, D_PAD, SECOND,
                )  # fmt: skip
            inherited = tl.where(live, -1 if SHARED else 1, 0).to(BITS)
            if (SHARED or EAGER) and not FLAT:
                end = tl.cumsum(count, 0)
                _position, member = members(child, end - count, end, N)
                inherited = pick(member, bits)
            kept = inherited & keep_bits(
                logit + energy[:, None] * variances[None, :] - norm[:, None],
                threshold, selects, row, GROUP, TILE_BATCH, BITS,
            )  # fmt: skip
            if FAR:  # asked for now, needed after the rows
                gone = (inherited & ~kept) != 0
                child_value = load_rows(means, node, gone, D, D, D_PAD)
            if LEAVES:
                rows = append_runs(found, found_bits, counter, kept, start, length, WRITE, SHARED)
                if SHARED:
                    read += tl.sum(tl.where(spread(kept, row, GROUP), length[None, :], 0), 1)
                else:
                    read += rows
                if CALIBRATED:
                    known = tl.where(
                        spread(kept, row, GROUP), log_mass(logit, length), float("-inf")
                    )
                    estimate_high, estimate, _weight, _decay = fold_mass(
                        estimate_high, estimate, known
                    )
            else:
                append(found, found_bits, counter, kept, node, SHARED)
            if FAR:
                high, mass, total = fold_nodes(
                    high, mass, total, inherited & ~kept, logit, length, child_value, row, exists,
                    GROUP,
                )  # fmt: skip
    if LEAVES:
        owner = exists & (row % GROUP == 0)
        tl.atomic_add(read_counts + z * TILE_BATCH + row // GROUP, read, mask=owner, sem="relaxed")
        if CALIBRATED:
            at = (z * parts + part) * ROWS + row
            tl.store(estimate_highs + at, estimate_high, mask=exists)
            tl.store(estimate_masses + at, estimate, mask=exists)
    if FAR:
        at = far_base + z * far_slots + part
        store_partial(sums, highs, masses, at, row, exists, high, mass, total, ROWS, D, D_PAD)
