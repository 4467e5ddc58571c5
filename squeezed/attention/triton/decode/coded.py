"""The kernel that attends to kept rows that are encoded, and to the mean values of dropped nodes.

It takes its part of the stream as `attention.attend_kernel` does.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from squeezed.attention.triton.decode.attention import attend_nodes
from squeezed.attention.triton.decode.coded_runs import attend_coded_runs, load_turned, store_turned
from squeezed.attention.triton.decode.softmax import problem, store_partial
from squeezed.attention.triton.decode.stream import at, stream


@triton.jit
def attend_coded_kernel(
    turned,
    coded,
    leaf_logits,
    kept,
    means,
    bounds,
    far,
    counters,
    partials,
    turned_sums,
    moved,
    batch,
    problems,
    pinned,
    GROUP: tl.constexpr,
    TILE_BATCH: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    TILE: tl.constexpr,
    NODE_TILE: tl.constexpr,
    NODE_UNIT: tl.constexpr,
    K_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    Z_PAD: tl.constexpr,
    BITS: tl.constexpr,
    SHARED: tl.constexpr,
    FAR: tl.constexpr,
    DIPOLE: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program's part of the stream; grid `(programs,)`."""
    queries, units = turned  # [Z, 2 * R, D], [Z, 2, R]
    key_codes, value_codes, scales, rows = coded  # [Hkv, n, ..] twice, [Hkv, n], n
    runs, run_bits, run_capacity = kept  # [Z, capacity] each
    far_nodes, far_variances, far_logits, far_capacity = far  # [Z, capacity] twice, with ROWS
    LEAVES: tl.constexpr = len(means) - 1
    program = tl.program_id(0)
    row = tl.arange(0, R)
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
        exists = (row < ROWS) & (tile * TILE_BATCH + row // GROUP < batch)
        unit = units + z * 2 * R + row
        first_row, first_run = head.to(tl.int64) * rows, z.to(tl.int64) * run_capacity
        leaves = bounds[LEAVES + 1] - bounds[LEAVES]
        peak, mass, acc, parts = attend_coded_runs(
            load_turned(queries, z, R, D, BITS, K_PAD),
            (tl.load(unit), tl.load(unit + R)),
            (
                key_codes + first_row * (D * BITS // 8),
                value_codes + first_row * (D * BITS // 16),
                scales + first_row,
            ),
            leaf_logits + z.to(tl.int64) * leaves * R,
            means[LEAVES] + head.to(tl.int64) * leaves * D,
            (runs + first_run, run_bits + first_run),
            at(runs_of, z, Z_PAD),
            first,
            tl.minimum(last, near),
            row,
            pinned,
            R,
            GROUP,
            D,
            D_PAD,
            TILE,
            K_PAD,
            V_PAD,
            BITS,
            SHARED,
            PTX,
            STAGES,
        )
        slot, before = program + z, peak
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
        decay = tl.exp2(before - tl.where(peak == float("-inf"), 0.0, peak))
        store_turned(turned_sums, slot, row, exists, parts, decay, ROWS, D, BITS)
