"""Select among nodes of the first two levels that are already scored.

Nearly every instruction of `descend_kernel` waits for the one before it. Where all nodes of the
second level are few enough to be scored in one streaming pass, selecting is a plain map over them.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from squeezed.ops.triton.lookup import energy_of
from squeezed.ops.triton.selection import attends_to_any, keep_bits, normaliser, settle
from squeezed.ops.triton.tile import load_query, load_rows, problem, store_partial


@triton.jit
def load_logits(logits, z, row, exists, node, live, nodes, ROWS: tl.constexpr):
    """First-order logits `[M, N]` of the given nodes."""
    line = (z * ROWS + row).to(tl.int64) * nodes
    mask = exists[:, None] & live[None, :]
    return tl.load(logits + line[:, None] + node[None, :], mask=mask, other=float("-inf"))


@triton.jit
def select_kernel(
    query, parent_alpha, alpha, parent_logits, logits, owner, parent_offsets, parent_variance,
    parent_means, key_offsets, variance, means, norm_highs, norm_masses,
    found, found_bits, counters, read_counts, sums, highs, masses, estimate_highs, estimate_masses,
    query_stride_batch, query_stride_head, batch, parents, nodes, blocks, found_capacity, splits,
    recent_base, recent_stride, recent_chunks, far_base, far_slots,
    parent_threshold, threshold, scale_bits,
    FOUND: tl.constexpr, COUNTERS: tl.constexpr, LEAVES: tl.constexpr, GROUP: tl.constexpr,
    TILE_BATCH: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, N: tl.constexpr, WRITE: tl.constexpr,
    NORM_PAD: tl.constexpr, RECENT_PAD: tl.constexpr, BITS: tl.constexpr, SHARED: tl.constexpr,
    SECOND: tl.constexpr, MASKED: tl.constexpr, FAR: tl.constexpr, CALIBRATED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid `(problems, blocks of nodes, then of parents if FAR)`; one block per program."""
    z, part = tl.program_id(0), tl.program_id(1)
    head, tile = problem(z, TILES)
    row = tl.arange(0, M)
    q, exists = load_query(
        query, query_stride_batch, query_stride_head, head, tile, row, batch,
        GROUP, TILE_BATCH, D, D_PAD,
    )  # fmt: skip
    parent_energy = energy_of(q, parent_alpha, head, row, scale_bits, GROUP, SECOND)
    energy = energy_of(q, alpha, head, row, scale_bits, GROUP, SECOND)
    of_parents = part >= blocks
    if FAR and of_parents:
        part -= blocks
        key_offsets, variance, means, nodes = parent_offsets, parent_variance, parent_means, parents
        logits, energy, threshold = parent_logits, parent_energy, parent_threshold
    node = part * N + tl.arange(0, N)
    live = node < nodes
    start = tl.load(key_offsets + head * (nodes + 1) + node, mask=live, other=0)
    size = tl.load(key_offsets + head * (nodes + 1) + node + 1, mask=live, other=0) - start
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    first = load_logits(logits, z, row, exists, node, live, nodes, ROWS)
    score = first
    inherits = live & (not of_parents)
    parent = tl.load(owner + head * nodes + node, mask=inherits, other=0)
    parent_score = load_logits(parent_logits, z, row, exists, parent, inherits, parents, ROWS)
    if SECOND:
        spread = tl.load(variance + head * nodes + node, mask=live, other=0.0)
        parent_spread = tl.load(parent_variance + head * parents + parent, mask=inherits, other=0.0)
        score += energy[:, None] * spread[None, :]
        parent_score += parent_energy[:, None] * parent_spread[None, :]
    norm = normaliser(norm_highs, norm_masses, z, splits, row, exists, ROWS, M, NORM_PAD)
    selects = exists
    if MASKED:
        recent = recent_base + z * recent_stride
        selects &= attends_to_any(highs, recent, recent_chunks, row, exists, ROWS, RECENT_PAD)
    alive = keep_bits(
        parent_score - norm[:, None], parent_threshold, selects, row, GROUP, TILE_BATCH, BITS
    )
    if FAR:
        alive = tl.where(of_parents, -1, alive).to(BITS)
    kept = alive & keep_bits(
        score - norm[:, None], threshold, selects, row, GROUP, TILE_BATCH, BITS
    )
    value = tl.zeros([N, D_PAD], means.dtype.element_ty)
    if FAR:
        dropped = live & (alive != kept)
        value = load_rows(means + head.to(tl.int64) * nodes * D, node, dropped, D, D, D_PAD)
    high = tl.full([M], float("-inf"), tl.float32)
    mass = tl.zeros([M], tl.float32)
    read = tl.zeros([M], tl.int32)
    listed = tl.where(of_parents, 0, kept).to(BITS)
    high, mass, total, known_high, known, read = settle(
        high, mass, tl.zeros([M, D_PAD], tl.float32), high, mass, read, first, node, start, size,
        kept, listed, alive, value, found + z.to(tl.int64) * found_capacity,
        found_bits + z.to(tl.int64) * found_capacity, counters + z * COUNTERS + FOUND, row, exists,
        True, LEAVES, FAR, CALIBRATED, GROUP, WRITE, SHARED,
    )  # fmt: skip
    if LEAVES:
        owns = exists & (row % GROUP == 0)
        tl.atomic_add(read_counts + z * TILE_BATCH + row // GROUP, read, mask=owns, sem="relaxed")
    if FAR:
        slot = far_base + z * far_slots + tl.program_id(1)
        store_partial(sums, highs, masses, slot, row, exists, high, mass, total, ROWS, D, D_PAD)
    if CALIBRATED and LEAVES:
        at = (z * tl.num_programs(1) + tl.program_id(1)) * ROWS + row
        tl.store(estimate_highs + at, known_high, mask=exists)
        tl.store(estimate_masses + at, known, mask=exists)
