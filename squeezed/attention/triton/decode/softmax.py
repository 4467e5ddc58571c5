"""What the decode kernels share: the tile of query rows and one step of an online softmax.

A *problem* `z` is one KV head and one tile of requests. Its rows are `row = request * G + member`:
up to 64 of them, so that requests sharing a context read every cluster once. All logits inside the
kernels are in bits (base two), because the hardware's exponential is `exp2`.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def problem(z, TILES: tl.constexpr):
    """KV head and tile of requests; tiles of one head are neighbours, so that they share L2."""
    return z // TILES, z % TILES


@triton.jit
def load_query(
    query,
    head,
    tile,
    row,
    batch,
    GROUP: tl.constexpr,
    TILE_BATCH: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """Rows `[M, D_PAD]` of a problem and whether each exists."""
    queries, batch_stride, head_stride = query  # [B, Hq, 1, D]
    request = tile * TILE_BATCH + row // GROUP
    exists = (row < TILE_BATCH * GROUP) & (request < batch)
    d = tl.arange(0, D_PAD)
    offset = request.to(tl.int64) * batch_stride + (head * GROUP + row % GROUP) * head_stride
    mask = exists[:, None] & (d < D)[None, :]
    return tl.load(queries + offset[:, None] + d[None, :], mask=mask, other=0.0), exists


@triton.jit
def load_rows(base, row, live, stride, D: tl.constexpr, D_PAD: tl.constexpr):
    """Rows `[N, D_PAD]` of a matrix; rows that are not live cost no bytes and are zero."""
    d = tl.arange(0, D_PAD)
    mask = live[:, None] & (d < D)[None, :]
    return tl.load(base + row.to(tl.int64)[:, None] * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def fold_mass(peak, mass, logits, AXIS: tl.constexpr):
    """Fold logits into a running log-sum-exp over `AXIS`, kept as its peak and scaled sum."""
    new = tl.maximum(peak, tl.max(logits, AXIS))
    safe = tl.where(new == float("-inf"), 0.0, new)  # all masked so far: avoid inf - inf
    weight = tl.exp2(logits - tl.expand_dims(safe, AXIS))
    decay = tl.exp2(peak - safe)
    return new, mass * decay + tl.sum(weight, AXIS), weight, decay


@triton.jit
def fold(peak, mass, acc, logits, values):
    """One step of an online softmax: logits `[M, N]`, values `[N, D_PAD]`, running sum `acc`."""
    peak, mass, weight, decay = fold_mass(peak, mass, logits, 1)
    acc = tl.dot(weight.to(values.dtype), values, acc=acc * decay[:, None])
    return peak, mass, acc


@triton.jit
def nothing(M: tl.constexpr, D_PAD: tl.constexpr):
    """An online softmax of no keys: its peak, its mass and its sum of values."""
    peak = tl.full([M], float("-inf"), tl.float32)
    return peak, tl.zeros([M], tl.float32), tl.zeros([M, D_PAD], tl.float32)


@triton.jit
def store_partial(
    partials,
    slot,
    row,
    exists,
    peak,
    mass,
    acc,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """Leave an unnormalised sum, its peak and its mass in a slot, for the last kernel."""
    sums, peaks, masses = partials  # [slots, ROWS, D], [slots, ROWS] twice
    at = slot.to(tl.int64) * ROWS + row
    d = tl.arange(0, D_PAD)
    tl.store(peaks + at, peak, mask=exists)
    tl.store(masses + at, mass, mask=exists)
    mask = exists[:, None] & (d < D)[None, :]
    tl.store(sums + at[:, None] * D + d[None, :], acc, mask=mask)


@triton.jit
def energy_of(q, alpha, head, row, scale_bits, GROUP: tl.constexpr, SECOND: tl.constexpr):
    """Factor of a node's variance in its logits, in bits, `[M]`; 0 to first order."""
    energy = tl.zeros(row.shape, tl.float32)
    if SECOND:
        energy = tl.sum(q.to(tl.float32) * q.to(tl.float32), 1)
        scale = scale_bits / LOG2_E
        weight = tl.load(alpha + head * GROUP + row % GROUP)
        energy = weight * energy * (0.5 * scale * scale * LOG2_E)
    return energy
