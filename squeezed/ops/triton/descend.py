"""The kernel that walks one level down the tree.

A program takes a few neighbouring nodes, finds their parents and which of those are kept, and
selects among the children of these. Kept leaves go to the list of rows to attend; of a level
between, it leaves a note which nodes are kept. Dropped nodes go to the list of the far field.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from squeezed.ops.triton.lookup import load_nodes, node_logits, node_scores
from squeezed.ops.triton.selection import (
    RUN,
    append_nodes,
    append_runs,
    attends_to_any,
    hand_down,
    keep_bits,
    normaliser,
    reserve,
    spread,
)
from squeezed.ops.triton.tile import LOG2_E, energy_of, load_query, problem


@triton.jit
def inherit(
    scores, parent, live, z, parents, norm, threshold, selects, row, exists,
    GROUP: tl.constexpr, TILE_BATCH: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Which requests keep the parent of each node `[N]`, by the scores the first kernel left."""
    place = (z.to(tl.int64) * parents + parent)[:, None] * ROWS + row[None, :]
    mask = live[:, None] & exists[None, :]
    score = tl.load(scores + place, mask=mask, other=float("-inf")) - norm[None, :]
    bits = keep_bits(score, threshold, selects, row, GROUP, TILE_BATCH, BITS)
    return tl.where(live, bits, 0)


@triton.jit
def list_found(
    kept, inherited, node, start, length, parent, first_child, parent_size,
    runs, run_bits, far_nodes, far_masses, far_bits, counter, base, parent_base,
    WRITE: tl.constexpr, SHARED: tl.constexpr, LEAVES: tl.constexpr, TOP: tl.constexpr,
    FAR: tl.constexpr, EVERYONE: tl.constexpr,
):  # fmt: skip
    """Append the rows of kept leaves, the dropped nodes, and at the TOP the dropped parents.

    A dropped parent is listed by the program that has its first child.
    """
    count = tl.zeros(node.shape, tl.int32)
    if LEAVES:
        count = tl.where(kept != 0, tl.cdiv(length, RUN), 0)
    dropped, orphaned = tl.zeros_like(kept), tl.zeros_like(kept)
    if FAR:
        dropped = tl.where(length > 0, inherited & ~kept, 0)
        if TOP:
            orphaned = tl.where(first_child & (parent_size > 0), EVERYONE & ~inherited, 0)
    gone, lost = (dropped != 0).to(tl.int32), (orphaned != 0).to(tl.int32)
    runs_found, nodes_found = tl.sum(count), tl.sum(gone)
    parents_found = tl.sum(lost)
    if runs_found + nodes_found + parents_found > 0:
        first_run, first_node = reserve(counter, runs_found, nodes_found + parents_found)
        if LEAVES:
            begin = first_run + tl.cumsum(count, 0) - count
            append_runs(runs, run_bits, begin, kept, start, length, count, WRITE, SHARED)
        if FAR:
            append_nodes(
                far_nodes, far_masses, far_bits, first_node, gone, dropped, base + node, length,
                SHARED,
            )  # fmt: skip
            if TOP:
                append_nodes(
                    far_nodes, far_masses, far_bits, first_node + nodes_found, lost, orphaned,
                    parent_base + parent, parent_size, SHARED,
                )  # fmt: skip


@triton.jit
def descend_kernel(
    query, alpha, scores, parents_of, states, child_states, child_offsets, parent_child_offsets,
    parent_offsets, centroids, key_offsets, variance, norm_highs, norm_masses,
    runs, run_bits, far_nodes, far_masses, far_bits, counters, read_counts, highs,
    query_stride_batch, query_stride_head, batch, parents, nodes, children, base, parent_base,
    run_capacity, far_capacity, splits, recent_base, recent_stride, recent_chunks,
    parent_thresholds, thresholds, scale_bits,
    TOP: tl.constexpr, FLAT: tl.constexpr, LEAVES: tl.constexpr,
    GROUP: tl.constexpr, TILE_BATCH: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
    R: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, N: tl.constexpr, WRITE: tl.constexpr,
    NORM_PAD: tl.constexpr, ROWS_PAD: tl.constexpr, NORM_STEP: tl.constexpr,
    RECENT_PAD: tl.constexpr, BITS: tl.constexpr, EVERYONE: tl.constexpr, SHARED: tl.constexpr,
    SECOND: tl.constexpr, MASKED: tl.constexpr, FAR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid `(problems, parts)`; a part is every `parts`-th block of `N` nodes of one level.

    TOP: their parents are nodes of the coarsest level, which are selected here. FLAT: there is only
    one level, whose nodes have no parents. Else the launch before noted who keeps the parent.
    """
    z, part = tl.program_id(0), tl.program_id(1)
    head, tile = problem(z, TILES)
    wide = z.to(tl.int64)
    row = tl.arange(0, R)
    q, exists = load_query(
        query, query_stride_batch, query_stride_head, head, tile, row, batch,
        GROUP, TILE_BATCH, D, D_PAD,
    )  # fmt: skip
    energy = energy_of(q, alpha, head, row, scale_bits, GROUP, SECOND)
    threshold = tl.load(thresholds + head) * LOG2_E
    parent_threshold = tl.load(parent_thresholds + head) * LOG2_E
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    norm = normaliser(norm_highs, norm_masses, z, splits, row, ROWS, ROWS_PAD, NORM_PAD, NORM_STEP)
    selects = exists
    if MASKED:
        recent = recent_base + z * recent_stride
        selects &= attends_to_any(highs, recent, recent_chunks, row, exists, ROWS, RECENT_PAD)
    read = tl.zeros([R], tl.int32)
    for block in range(part * N, nodes, tl.num_programs(1) * N):
        node = block + tl.arange(0, N)
        live = node < nodes
        parent, first_child, parent_size = node, live, node
        inherited = tl.where(live, EVERYONE, 0).to(BITS)
        if TOP and not FLAT:
            parent = tl.load(parents_of + wide * nodes + node, mask=live, other=0)
            if FAR:
                first = tl.load(parent_child_offsets + head * (parents + 1) + parent)
                first_child = (first == node) & live
                edge = parent_offsets + head * (parents + 1) + parent
                parent_size = tl.load(edge + 1) - tl.load(edge)
            inherited = inherit(
                scores, parent, live, z, parents, norm, parent_threshold, selects, row, exists,
                GROUP, TILE_BATCH, ROWS, BITS,
            )  # fmt: skip
        if not TOP:
            inherited = tl.load(states + wide * nodes + node, mask=live, other=0)
        mean, start, length, variances = load_nodes(
            centroids, key_offsets, variance, node, inherited != 0, head, nodes, D, D_PAD, SECOND
        )
        logit = node_logits(q, mean, length, scale_bits)
        score = node_scores(logit, energy, variances, SECOND) - norm[None, :]
        kept = inherited & keep_bits(score, threshold, selects, row, GROUP, TILE_BATCH, BITS)
        list_found(
            kept, inherited, node, start, length, parent, first_child, parent_size,
            runs + wide * run_capacity, run_bits + wide * run_capacity,
            far_nodes + wide * far_capacity, far_masses + wide * far_capacity,
            far_bits + wide * far_capacity, counters + z, base, parent_base,
            WRITE, SHARED, LEAVES, TOP and not FLAT, FAR, EVERYONE,
        )  # fmt: skip
        if LEAVES:
            wanted = spread(kept, row, 0, GROUP)
            read += tl.sum(tl.where(wanted, length[:, None], 0), 0)
        else:
            at = child_offsets + head * (nodes + 1) + node
            child = tl.load(at, mask=live, other=0)
            end = tl.load(at + 1, mask=live, other=0)
            hand_down(child_states + wide * children, child, end, kept, WRITE)
    if LEAVES:
        owner = exists & (row % GROUP == 0) & (read > 0)
        tl.atomic_add(read_counts + z * TILE_BATCH + row // GROUP, read, mask=owner, sem="relaxed")
