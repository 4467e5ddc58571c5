"""The kernel that attends to kept rows, and to the mean values of dropped nodes.

What every problem reads, its kept rows and then its dropped nodes, forms one stream of units that
is cut into equal parts, one per program. A head that keeps many keys therefore takes many programs
and holds nobody up. A program leaves one partial sum per problem it touches, in slot `program + z`:
unique, because along the stream either the program or the problem moves on.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from squeezed.attention.triton.decode.selection import RUN, RUN_BITS, wanted_by
from squeezed.attention.triton.decode.softmax import (
    fold,
    fold_mass,
    load_query,
    load_rows,
    nothing,
    problem,
    store_partial,
)
from squeezed.attention.triton.decode.stream import UNIT, at, stream


@triton.jit
def repeat(values, TILE: tl.constexpr):
    """A vector `[TILE / RUN]`, RUN times over: cheaper than to load every entry RUN times."""
    return tl.reshape(tl.broadcast_to(values[None, :], (RUN, TILE // RUN)), (TILE,))


@triton.jit
def attend_runs(
    q,
    peak,
    mass,
    acc,
    keys,
    values,
    kept,
    count,
    first,
    last,
    row,
    scale_bits,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    TILE: tl.constexpr,
    SHARED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add units `first:last` of a list of `count` runs of rows to a running softmax."""
    runs, run_bits = kept  # [runs] each
    lane, entry = tl.arange(0, TILE), tl.arange(0, TILE // RUN)
    within, of = lane // (TILE // RUN), lane % (TILE // RUN)  # the rows of a run lie far apart
    stop = tl.minimum(last * (UNIT // RUN), count)
    for start in tl.range(first * (UNIT // RUN), stop, TILE // RUN, num_stages=STAGES):
        packed = tl.load(runs + start + entry, mask=start + entry < stop, other=0)
        run = repeat(packed, TILE)
        live = (start + of < stop) & (within <= (run & (RUN - 1)))
        # Behind its end a run repeats its last row, which costs no mask and no memory traffic.
        place = (run >> RUN_BITS) + tl.minimum(within, run & (RUN - 1))
        everywhere = tl.full([TILE], True, tl.int1)
        key = load_rows(keys, place, everywhere, D, D, D_PAD)
        value = load_rows(values, place, everywhere, D, D, D_PAD)
        logits = tl.dot(q, tl.trans(key)) * scale_bits
        attended = live[None, :]
        if SHARED:
            wanted = tl.load(run_bits + start + entry, mask=start + entry < stop, other=0)
            attended = attended & wanted_by(repeat(wanted, TILE), row // GROUP, 1)
        logits = tl.where(attended, logits, float("-inf"))
        peak, mass, acc = fold(peak, mass, acc, logits, value)
    return peak, mass, acc


@triton.jit
def listed(entries, start, stop, TILE: tl.constexpr):
    """Entries `[start, start + TILE)` of a list that ends at `stop`, zero behind it.

    Read as a matrix: a vector would be loaded again in every layout that its uses ask for.
    """
    line, lane = tl.arange(0, RUN)[:, None], tl.arange(0, TILE // RUN)[None, :]
    place = start + line * (TILE // RUN) + lane
    return tl.reshape(tl.load(entries + place, mask=place < stop, other=0), (TILE,))


@triton.jit
def node_rows(means, bounds, node, head, D: tl.constexpr):
    """Where the mean values of nodes `[N]` of any level lie; `bounds` are levels' first numbers."""
    rows = means[0] + head * (bounds[1] - bounds[0]) * D + node.to(tl.int64) * D
    for level in tl.static_range(1, len(means)):
        own = means[level] + head * (bounds[level + 1] - bounds[level]) * D
        rows = tl.where(node >= bounds[level], own + (node - bounds[level]).to(tl.int64) * D, rows)
    return rows


@triton.jit
def attend_nodes(
    peak,
    mass,
    acc,
    means,
    bounds,
    far,
    count,
    first,
    last,
    head,
    row,
    exists,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    TILE: tl.constexpr,
    NODE_UNIT: tl.constexpr,
    DIPOLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add units `first:last` of a list of `count` dropped nodes to a running softmax.

    Returns with it the sum of the nodes' variances, weighted alike, `[M]`; zero without DIPOLE.
    """
    nodes, variances, logits = far  # [nodes] twice, [nodes, ROWS]
    stop = tl.minimum(last * NODE_UNIT, count)
    d, lane = tl.arange(0, D_PAD), tl.arange(0, TILE)
    moved = tl.zeros(row.shape, tl.float32)
    for start in tl.range(first * NODE_UNIT, stop, TILE, num_stages=STAGES):
        node = listed(nodes, start, stop, TILE)
        rows = node_rows(means, bounds, node, head, D)
        value = tl.load(rows[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)
        live = start + lane < stop
        places = (start + lane).to(tl.int64)[None, :] * ROWS + row[:, None]
        logit = tl.load(logits + places, mask=exists[:, None] & live[None, :], other=float("-inf"))
        peak, mass, weight, decay = fold_mass(peak, mass, logit, 1)
        acc = tl.dot(weight.to(value.dtype), value, acc=acc * decay[:, None])
        if DIPOLE:
            variance = tl.load(variances + start + lane, mask=live, other=0.0)
            moved = moved * decay + tl.sum(weight * variance[None, :], 1)
    return peak, mass, acc, moved


@triton.jit
def attend_kernel(
    query,
    context,
    kept,
    means,
    bounds,
    far,
    counters,
    partials,
    moved,
    batch,
    problems,
    scale_bits,
    GROUP: tl.constexpr,
    TILE_BATCH: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    TILE: tl.constexpr,
    NODE_TILE: tl.constexpr,
    NODE_UNIT: tl.constexpr,
    Z_PAD: tl.constexpr,
    SHARED: tl.constexpr,
    FAR: tl.constexpr,
    DIPOLE: tl.constexpr,
    PDL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program's part of the stream; grid `(programs,)`."""
    keys, values, tokens = context  # [Hkv, P, D] twice
    runs, run_bits, run_capacity = kept  # [Z, capacity] each
    far_nodes, far_variances, far_logits, far_capacity = far  # [Z, capacity] twice, with ROWS
    program = tl.program_id(0)
    row = tl.arange(0, M)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    runs_of, dropped_of, near_of, begin, end = stream(counters, problems, Z_PAD, NODE_UNIT)
    total = tl.max(end)
    share = tl.cdiv(total, tl.num_programs(0))
    cursor = program * share
    stop = tl.minimum(total, cursor + share)
    while cursor < stop:
        z = tl.sum((end <= cursor).to(tl.int32) * (tl.arange(0, Z_PAD) < problems))
        first = cursor - at(begin, z, Z_PAD)
        cursor = tl.minimum(stop, at(end, z, Z_PAD))
        last = cursor - at(begin, z, Z_PAD)
        near = at(near_of, z, Z_PAD)
        head, tile = problem(z, TILES)
        q, exists = load_query(query, head, tile, row, batch, GROUP, TILE_BATCH, D, D_PAD)
        exists = exists & (row < ROWS)
        first_key = head.to(tl.int64) * tokens * D
        first_run = z.to(tl.int64) * run_capacity
        peak, mass, acc = nothing(M, D_PAD)
        peak, mass, acc = attend_runs(
            q,
            peak,
            mass,
            acc,
            keys + first_key,
            values + first_key,
            (runs + first_run, run_bits + first_run),
            at(runs_of, z, Z_PAD),
            first,
            tl.minimum(last, near),
            row,
            scale_bits,
            GROUP,
            D,
            D_PAD,
            TILE,
            SHARED,
            STAGES,
        )
        slot = program + z
        if FAR:
            first_node = z.to(tl.int64) * far_capacity
            own = (
                far_nodes + first_node,
                far_variances + first_node,
                far_logits + first_node * ROWS,
            )
            peak, mass, acc, node_moved = attend_nodes(
                peak,
                mass,
                acc,
                means,
                bounds,
                own,
                at(dropped_of, z, Z_PAD),
                tl.maximum(first - near, 0),
                tl.maximum(last - near, 0),
                head.to(tl.int64),
                row,
                exists,
                ROWS,
                D,
                D_PAD,
                NODE_TILE,
                NODE_UNIT,
                DIPOLE,
                STAGES,
            )
            if DIPOLE:
                tl.store(moved + slot.to(tl.int64) * ROWS + row, node_moved, mask=exists)
        store_partial(partials, slot, row, exists, peak, mass, acc, ROWS, D, D_PAD)
