"""Kernels of spherical k-means over many runs of points at once, without padding.

A *run* is a contiguous stretch of points that is clustered by itself: all keys of a head at the
coarsest level, the keys of one node below it. Its centroids are contiguous too, so neither scores
nor padded copies are ever stored: a program holds a few points and walks the centroids of its run.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_parts(rows, ok, DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    """Vectors in two parts; the second is the first again where there is none."""
    dims = tl.arange(0, MAIN)
    main = tl.load(rows + dims, mask=ok[:, None] & (dims < DIM), other=0.0)
    rest = main
    if REST:
        dims = MAIN + tl.arange(0, REST)
        rest = tl.load(rows + dims, mask=ok[:, None] & (dims < DIM), other=0.0)
    return main, rest


@triton.jit
def assign_kernel(
    points,
    centroids,
    runs,
    tiles,
    label,
    similarity,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Nearest centroid of `BLOCK_P` points of one run, and the cosine to it.

    Vectors are taken in `MAIN` and then `REST` numbers, powers of two that may add up to more.
    `points [N, DIM]`, `centroids [K, DIM]`; `label` and `similarity` `[N]` are written.
    """
    run_end, first_centroid, last_centroid = runs  # [S] each
    tile_run, tile_start = tiles  # [tiles] each
    run = tl.load(tile_run + tl.program_id(0))
    begin, end = tl.load(tile_start + tl.program_id(0)), tl.load(run_end + run)
    if begin >= end:
        return
    row = begin + tl.arange(0, BLOCK_P)
    ok = row < end
    x_rows = points + row.to(tl.int64)[:, None] * DIM
    x, x_rest = load_parts(x_rows, ok, DIM, MAIN, REST)
    first, last = tl.load(first_centroid + run), tl.load(last_centroid + run)
    best = tl.full([BLOCK_P, BLOCK_C], -2.0, tl.float32)  # below every cosine
    step = tl.zeros([BLOCK_P, BLOCK_C], tl.int32)
    for at in range(0, last - first, BLOCK_C):
        slot = at + tl.arange(0, BLOCK_C)
        there = slot < last - first
        c_rows = centroids + (first + slot).to(tl.int64)[:, None] * DIM
        c, c_rest = load_parts(c_rows, there, DIM, MAIN, REST)
        cosine = tl.dot(x, tl.trans(c), input_precision="ieee")
        if REST:
            cosine = tl.dot(x_rest, tl.trans(c_rest), cosine, input_precision="ieee")
        cosine = tl.where(there[None, :], cosine, -2.0)
        better = cosine > best
        best = tl.where(better, cosine, best)
        step = tl.where(better, at, step)
    nearest = tl.max(best, 1)
    slots = tl.where(best == nearest[:, None], step + tl.arange(0, BLOCK_C), last)
    tl.store(label + row, tl.min(slots, 1), mask=ok)  # the first of those that are as near
    tl.store(similarity + row, nearest, mask=ok)


@triton.jit
def sum_rows(
    rows,
    order,
    start,
    end,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Sum of the rows `start:end`, or of those that `order` lists there, `[BLOCK_D]` float32."""
    dims = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for at in range(start, end, BLOCK_P):
        slot = at + tl.arange(0, BLOCK_P)
        row = tl.load(order + slot, mask=slot < end, other=0) if LISTED else slot
        inside = (slot < end)[:, None] & (dims < DIM)
        x = tl.load(rows + row.to(tl.int64)[:, None] * DIM + dims, mask=inside, other=0.0)
        total += x.to(tl.float32)
    return tl.sum(total, 0)


@triton.jit
def centroid_kernel(
    points,
    order,
    offsets,
    centroids,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Direction of the mean of one cluster's points; an empty cluster keeps its centroid.

    `points [N, DIM]` in the `order [N]` of clusters, `offsets [K + 1]`, `centroids [K, DIM]`.
    """
    node = tl.program_id(0)
    start, end = tl.load(offsets + node), tl.load(offsets + node + 1)
    if start == end:
        return
    dims = tl.arange(0, BLOCK_D)
    total = sum_rows(points, order, start, end, DIM, BLOCK_D, BLOCK_P, True)
    total /= tl.maximum(tl.sqrt(tl.sum(total * total, 0)), 1e-12)
    target = centroids + node.to(tl.int64) * DIM + dims
    tl.store(target, total.to(centroids.dtype.element_ty), mask=dims < DIM)


@triton.jit(do_not_specialize=["tokens", "nodes", "unclustered"])
def describe_kernel(
    keys,
    values,
    level,
    space,
    tokens,
    nodes,
    unclustered,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SPACE: tl.constexpr,
):
    """Mean key, mean value and key variance of one node, from sorted rows; zero if it is empty.

    In a space of the keys the mean of `energies` takes the place of the variance, and `means` get
    the mean key in float32. `keys` and `values` are `[H, P, DIM]`.
    """
    centroids, mean_values, variance, offsets = level  # [H, C, DIM] twice, [H, C], [H, C + 1]
    energies, means = space  # [H, clustered], [H, C, DIM]
    node, head = tl.program_id(0) % nodes, (tl.program_id(0) // nodes).to(tl.int64)
    edge = offsets + head * (nodes + 1) + node
    start, end = tl.load(edge), tl.load(edge + 1)
    dims = tl.arange(0, BLOCK_D)
    line = head * nodes + node
    dtype = centroids.dtype.element_ty
    k_head, v_head = keys + head * tokens * DIM, values + head * tokens * DIM
    count = tl.maximum(end - start, 1).to(tl.float32)
    mean = sum_rows(k_head, offsets, start, end, DIM, BLOCK_D, BLOCK_P, False) / count
    if SPACE:
        first = energies + head * (tokens - unclustered) - unclustered
        energy = tl.zeros([BLOCK_P], tl.float32)
        for at in range(start, end, BLOCK_P):
            row = at + tl.arange(0, BLOCK_P)
            energy += tl.load(first + row, mask=row < end, other=0.0)
        tl.store(variance + line, tl.sum(energy, 0) / count)
        tl.store(means + line * DIM + dims, mean, mask=dims < DIM)
    else:
        energy = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
        for at in range(start, end, BLOCK_P):
            row = at + tl.arange(0, BLOCK_P)
            inside = (row < end)[:, None] & (dims < DIM)
            x = tl.load(k_head + row.to(tl.int64)[:, None] * DIM + dims, mask=inside, other=0.0)
            off = tl.where(inside, x.to(tl.float32) - mean[None, :], 0.0)
            energy += off * off
        tl.store(variance + line, tl.sum(tl.sum(energy, 0), 0) / (count * DIM))
    value = sum_rows(v_head, offsets, start, end, DIM, BLOCK_D, BLOCK_P, False) / count
    tl.store(centroids + line * DIM + dims, mean.to(dtype), mask=dims < DIM)
    tl.store(mean_values + line * DIM + dims, value.to(dtype), mask=dims < DIM)
