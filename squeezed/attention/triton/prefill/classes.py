"""Attention of a tile to each class of its work: kept rows, the suffix, dropped nodes."""

from __future__ import annotations

import triton
import triton.language as tl

NEG_INF: tl.constexpr = tl.constexpr(float("-inf"))


@triton.jit
def softmax_step(raw, scale, acc, peak, mass, v):
    """Add one tile of keys, `raw * scale` their logits in base 2, to a running softmax.

    Returns with it the tile's weights, and by how much older weights have shrunk.
    """
    top = tl.maximum(peak, tl.max(raw, 1) * scale)
    base = tl.where(top == NEG_INF, 0.0, top)
    p = tl.exp2(raw * scale - base[:, None])
    shrink = tl.exp2(peak - base)
    mass = mass * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, top, mass, p, shrink


@triton.jit
def attend_rows(
    q,
    scale,
    acc,
    peak,
    mass,
    keys,
    values,
    list_,
    first,
    last,
    count,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """Units `first:last` of the rows of one head in `list_`.

    With `PARTIAL` the last of the `count` rows may end inside a unit.
    """
    dims, lane = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    row = first * BLOCK_N + lane
    row = tl.load(list_ + row, mask=row < count, other=0)
    for unit in range(first, last):
        slot = unit * BLOCK_N + lane
        at = row[:, None].to(tl.int64) * DIM + dims
        if PARTIAL or DIM != BLOCK_D:
            inside = (slot < count)[:, None] & (dims < DIM)
            k = tl.load(keys + at, mask=inside, other=0.0)
            v = tl.load(values + at, mask=inside, other=0.0)
        else:
            k, v = tl.load(keys + at), tl.load(values + at)
        raw = tl.dot(q, tl.trans(k), input_precision="ieee")
        if PARTIAL:
            raw = tl.where((slot < count)[None, :], raw, NEG_INF)
        acc, peak, mass, _, _ = softmax_step(raw, scale, acc, peak, mass, v)
        row = slot + BLOCK_N  # one unit ahead, so that no key waits for its address
        row = tl.load(list_ + row, mask=row < count, other=0)
    return acc, peak, mass


@triton.jit
def attend_nodes(
    q,
    scale,
    acc,
    peak,
    mass,
    moved,
    energy,
    centroids,
    means,
    list_,
    log_sizes,
    variances,
    first,
    last,
    count,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIPOLE: tl.constexpr,
):
    """Units `first:last` of one level's dropped nodes; `log_sizes`: how many keys each stands for.

    If DIPOLE, `moved` sums their `variances` with the weights of the softmax, `[BLOCK_M]`.
    """
    dims, lane = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    slot = first * BLOCK_N + lane
    log_size = tl.load(log_sizes + slot, mask=slot < count, other=NEG_INF)
    node = tl.load(list_ + slot, mask=slot < count, other=0)
    variance = log_size
    if DIPOLE:
        variance = tl.load(variances + slot, mask=slot < count, other=0.0)
    for unit in range(first, last):
        at = node[:, None].to(tl.int64) * DIM + dims
        inside = (dims < DIM)[None, :]
        k = tl.load(centroids + at, mask=inside, other=0.0)
        v = tl.load(means + at, mask=inside, other=0.0)
        raw = tl.dot(q, tl.trans(k), input_precision="ieee") + (log_size / scale)[None, :]
        if DIPOLE:
            raw += (energy / scale)[:, None] * variance[None, :]
        acc, peak, mass, weights, shrink = softmax_step(raw, scale, acc, peak, mass, v)
        if DIPOLE:
            moved = moved * shrink + tl.sum(weights * variance[None, :], 1)
        slot = (unit + 1) * BLOCK_N + lane  # one unit ahead, so that no key waits for its address
        log_size = tl.load(log_sizes + slot, mask=slot < count, other=NEG_INF)
        node = tl.load(list_ + slot, mask=slot < count, other=0)
        if DIPOLE:
            variance = tl.load(variances + slot, mask=slot < count, other=0.0)
    return acc, peak, mass, moved


@triton.jit
def attend_suffix(
    q,
    scale,
    acc,
    peak,
    mass,
    keys,
    key_stride,
    values,
    value_stride,
    mask,
    mask_row_stride,
    mask_step,
    row,
    ok,
    first,
    last,
    rows,
    suffix,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Units `first:last` of the tokens after the context, under their mask."""
    dims = tl.arange(0, BLOCK_D)
    for unit in tl.range(first, last, num_stages=1):  # few: spare shared memory
        slot = unit * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (slot < suffix)[:, None] & (dims < DIM)
        at = slot[:, None].to(tl.int64)
        k = tl.load(keys + at * key_stride + dims, mask=inside, other=0.0)
        v = tl.load(values + at * value_stride + dims, mask=inside, other=0.0)
        raw = tl.dot(q, tl.trans(k), input_precision="ieee")
        seen = (slot < suffix)[None, :] & ok[:, None]
        if CAUSAL:
            seen = seen & (slot[None, :] <= row[:, None] + (suffix - rows))
        else:
            bit = mask + row[:, None].to(tl.int64) * mask_row_stride + slot[None, :] * mask_step
            seen = seen & (tl.load(bit, mask=seen, other=0) != 0)
        raw = tl.where(seen, raw, NEG_INF)
        acc, peak, mass, _, _ = softmax_step(raw, scale, acc, peak, mass, v)
    return acc, peak, mass
