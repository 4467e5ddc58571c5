"""What the walk writes down: kept leaves as runs of rows, and dropped nodes."""

import triton
import triton.language as tl

from squeezed.attention.triton.decode.nodes import node_scores
from squeezed.attention.triton.decode.selection import (
    RUN,
    append_nodes,
    append_runs,
    keep_bits,
    log_size,
    reserve,
)


@triton.jit
def list_found(
    kept,
    inherited,
    node,
    base,
    start,
    length,
    variance,
    logit,
    far_energy,
    row,
    exists,
    runs,
    leaf_logits,
    far,
    counter,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WRITE: tl.constexpr,
    SHARED: tl.constexpr,
    LEAVES: tl.constexpr,
    CODED: tl.constexpr,
    FAR: tl.constexpr,
    DIPOLE: tl.constexpr,
):
    """Append the rows of kept leaves and the dropped nodes; `base + node` are those of all levels.

    Of encoded rows the leaves' logits are left too, `[C, R]`.
    """
    count, dropped = tl.zeros(node.shape, tl.int32), tl.zeros_like(kept)
    if LEAVES:
        count = tl.where(kept != 0, tl.cdiv(length, RUN), 0)
    if FAR:
        dropped = inherited & ~kept
    runs_found, nodes_found = tl.sum(count), tl.sum((dropped != 0).to(tl.int32))
    if runs_found + nodes_found > 0:
        first_run, first_node = reserve(counter, runs_found, nodes_found)
        if LEAVES:
            begin = first_run + tl.cumsum(count, 0) - count
            append_runs(runs, begin, kept, node, start, length, count, WRITE, SHARED, CODED)
            if CODED:
                place = node[:, None] * row.shape[0] + row[None, :]
                chosen = tl.broadcast_to((kept != 0)[:, None], place.shape)
                tl.store(leaf_logits + place, logit, mask=chosen)
        if FAR:
            mass = node_scores(logit, far_energy, variance, DIPOLE) + log_size(length)[:, None]
            append_nodes(
                far,
                first_node,
                dropped,
                base + node,
                variance,
                mass,
                row,
                exists,
                GROUP,
                ROWS,
                SHARED,
                DIPOLE,
            )


@triton.jit
def list_coarsest(
    first,
    step,
    scores,
    key_offsets,
    variance,
    nodes,
    base,
    bar,
    energy,
    far_energy,
    row,
    exists,
    far,
    counter,
    GROUP: tl.constexpr,
    TILE_BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    BITS,
    EVERYONE: tl.constexpr,
    SHARED: tl.constexpr,
    SECOND: tl.constexpr,
    DIPOLE: tl.constexpr,
):
    """Append the dropped ones of some blocks of the coarsest nodes, by the first kernel's scores.

    All pointers are those of the problem and its head.
    """
    for block in range(first * N, nodes, step * N):
        node = block + tl.arange(0, N)
        live = node < nodes
        place = node.to(tl.int64)[:, None] * ROWS + row[None, :]
        mask = live[:, None] & exists[None, :]
        score = tl.load(scores + place, mask=mask, other=float("-inf"))
        start = tl.load(key_offsets + node, mask=live, other=0)
        size = tl.load(key_offsets + node + 1, mask=live, other=0) - start
        variances = tl.zeros(node.shape, tl.float32)
        if SECOND or DIPOLE:
            variances = tl.load(variance + node, mask=live, other=0.0)
        kept = keep_bits(score, bar, row, GROUP, TILE_BATCH, BITS)
        dropped = tl.where(size > 0, EVERYONE & ~kept, 0)
        logit = score + (far_energy - energy)[None, :] * variances[:, None]
        logit += log_size(size)[:, None]
        found = tl.sum((dropped != 0).to(tl.int32))
        if found > 0:
            _, begin = reserve(counter, tl.zeros_like(found), found)
            append_nodes(
                far,
                begin,
                dropped,
                base + node,
                variances,
                logit,
                row,
                exists,
                GROUP,
                ROWS,
                SHARED,
                DIPOLE,
            )
