"""The kernel that walks one level down the tree.

A program takes a few neighbouring nodes, finds their parents and which of those are kept, and
selects among the children of these. Kept leaves go to the list of rows to attend; of a level
between, it leaves a note which nodes are kept. Dropped nodes go to the list of the far field, with
their masses: nobody needs to multiply their mean keys again.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from squeezed.attention.triton.decode.listing import list_coarsest, list_found
from squeezed.attention.triton.decode.nodes import load_nodes, node_logits, node_scores
from squeezed.attention.triton.decode.selection import (
    hand_down,
    keep_bits,
    normaliser,
    wanted_by,
)
from squeezed.attention.triton.decode.softmax import LOG2_E, energy_of, load_query, problem


@triton.jit
def inherit(
    scores,
    parent,
    live,
    bar,
    row,
    exists,
    GROUP: tl.constexpr,
    TILE_BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
):
    """Which requests keep the parent of each node `[N]`, by the scores the first kernel left."""
    place = parent.to(tl.int64)[:, None] * ROWS + row[None, :]
    mask = live[:, None] & exists[None, :]
    score = tl.load(scores + place, mask=mask, other=float("-inf"))
    return keep_bits(score, bar, row, GROUP, TILE_BATCH, BITS)


@triton.jit
def descend_kernel(
    query,
    above,
    level,
    alphas,
    thresholds,
    scores,
    parents_of,
    states,
    child_states,
    children,
    norms,
    kept,
    leaf_logits,
    far,
    counters,
    read_counts,
    valid,
    batch,
    listers,
    scale_bits,
    TOP: tl.constexpr,
    FLAT: tl.constexpr,
    LEAVES: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_BATCH: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    N: tl.constexpr,
    WRITE: tl.constexpr,
    NORM_PAD: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    NORM_STEP: tl.constexpr,
    REQUESTS: tl.constexpr,
    BITS: tl.constexpr,
    EVERYONE: tl.constexpr,
    SHARED: tl.constexpr,
    SECOND: tl.constexpr,
    PADDED: tl.constexpr,
    CODED: tl.constexpr,
    FAR: tl.constexpr,
    DIPOLE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid `(problems, parts + listers)`; a part is every `parts`-th block of `N` nodes of a level.

    TOP: their parents are nodes of the coarsest level, which are selected here. With a far field,
    listers share the blocks of the coarsest level, whose dropped nodes are to be listed too.
    FLAT: there is only one level, whose nodes have no parents.
    Else the launch before noted who keeps the parent.
    """
    parent_variance, parent_offsets, parents, parent_base = above  # [Hkv, C], [Hkv, C + 1]
    centroids, variance, key_offsets, child_offsets, nodes, base = level
    parent_alpha, alpha, far_alpha = alphas  # [Hq] each
    parent_threshold, threshold = thresholds  # [Hkv] each
    runs, run_bits, run_capacity = kept  # [Z, capacity] each
    far_nodes, far_variances, far_logits, far_capacity = far  # [Z, capacity] twice, with ROWS
    z, part = tl.program_id(0), tl.program_id(1)
    head, tile = problem(z, TILES)
    wide = z.to(tl.int64)
    row = tl.arange(0, R)
    q, exists = load_query(query, head, tile, row, batch, GROUP, TILE_BATCH, D, D_PAD)
    energy = energy_of(q, alpha, head, row, scale_bits, GROUP, SECOND)
    far_energy = energy_of(q, far_alpha, head, row, scale_bits, GROUP, DIPOLE)
    threshold, parent_threshold = tl.load(threshold + head), tl.load(parent_threshold + head)
    selects = exists
    if PADDED:
        real, real_stride = valid  # [B, 1]
        at = (tile * TILE_BATCH + row // GROUP).to(tl.int64) * real_stride
        selects &= tl.load(real + at, mask=exists, other=0) != 0
    scores += wide * parents * ROWS
    first_node = wide * far_capacity
    own_far = far_nodes + first_node, far_variances + first_node, far_logits + first_node * ROWS
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    norm = normaliser(norms, z, row, ROWS, ROWS_PAD, NORM_PAD, NORM_STEP)
    # What a score must exceed to be kept; nothing is where a row selects nothing.
    bar = tl.where(selects, norm + threshold * LOG2_E, float("inf"))
    parent_bar = tl.where(selects, norm + parent_threshold * LOG2_E, float("inf"))
    request = tl.arange(0, REQUESTS)
    read = tl.zeros([REQUESTS], tl.int32)
    parts = tl.num_programs(1) - listers
    if TOP and FAR and not FLAT and part >= parts:
        list_coarsest(
            part - parts,
            listers,
            scores,
            parent_offsets + head * (parents + 1),
            parent_variance + head * parents,
            parents,
            parent_base,
            parent_bar,
            energy_of(q, parent_alpha, head, row, scale_bits, GROUP, SECOND),
            far_energy,
            row,
            exists,
            own_far,
            counters + z,
            GROUP,
            TILE_BATCH,
            ROWS,
            N,
            BITS,
            EVERYONE,
            SHARED,
            SECOND,
            DIPOLE,
        )
    else:
        for block in range(part * N, nodes, parts * N):
            node = block + tl.arange(0, N)
            live = node < nodes
            if FLAT:
                inherited = tl.where(live, EVERYONE, 0).to(BITS)
            elif TOP:
                parent = tl.load(parents_of + wide * nodes + node, mask=live, other=0)
                inherited = inherit(
                    scores,
                    parent,
                    live,
                    parent_bar,
                    row,
                    exists,
                    GROUP,
                    TILE_BATCH,
                    ROWS,
                    BITS,
                )
            else:
                inherited = tl.load(states + wide * nodes + node, mask=live, other=0)
            keeps = inherited & 0
            busy = True
            if not TOP and not FLAT:  # few are: a look at the notes of most blocks suffices
                busy = tl.max((inherited != 0).to(tl.int32)) > 0
            if busy:
                mean, start, length, variances = load_nodes(
                    (centroids, variance, key_offsets, child_offsets, nodes),
                    node,
                    inherited != 0,
                    head,
                    D,
                    D_PAD,
                    SECOND or DIPOLE,
                )
                inherited = tl.where(length > 0, inherited, 0)
                logit = node_logits(q, mean, scale_bits)
                score = node_scores(logit, energy, variances, SECOND)
                keeps = inherited & keep_bits(score, bar, row, GROUP, TILE_BATCH, BITS)
                list_found(
                    keeps,
                    inherited,
                    node,
                    base,
                    start,
                    length,
                    variances,
                    logit,
                    far_energy,
                    row,
                    exists,
                    (runs + wide * run_capacity, run_bits + wide * run_capacity),
                    leaf_logits + wide * nodes * R,
                    own_far,
                    counters + z,
                    GROUP,
                    ROWS,
                    WRITE,
                    SHARED,
                    LEAVES,
                    CODED,
                    FAR,
                    DIPOLE,
                )
                if LEAVES:
                    wanted = wanted_by(keeps, request, 0)
                    read += tl.sum(tl.where(wanted, length[:, None], 0), 0)
            if not LEAVES:
                at = child_offsets + head * (nodes + 1) + node
                child = tl.load(at, mask=live, other=0)
                end = tl.load(at + 1, mask=live, other=0)
                hand_down(child_states + wide * children, child, end, keeps, WRITE)
    if LEAVES:
        found = (request < TILE_BATCH) & (read > 0)
        tl.atomic_add(read_counts + z * TILE_BATCH + request, read, mask=found, sem="relaxed")
