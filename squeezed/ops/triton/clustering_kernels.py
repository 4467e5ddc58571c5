"""Kernels of spherical k-means over many runs of points at once, without padding.

A *run* is a contiguous stretch of points that is clustered by itself: all keys of a head at the
coarsest level, the keys of one node below it. Its centroids are contiguous too, so neither scores
nor padded copies are ever stored: a program holds a few points and walks the centroids of its run.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def assign_kernel(
    points, centroids, live, run_start, run_end, first_centroid, last_centroid,
    tile_run, tile_start, label, similarity,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Nearest centroid of `BLOCK_P` points of one run, and the cosine to it."""
    run = tl.load(tile_run + tl.program_id(0))
    row = tl.load(tile_start + tl.program_id(0)) + tl.arange(0, BLOCK_P)
    dims = tl.arange(0, BLOCK_D)
    ok = row < tl.load(run_end + run)
    wide = row.to(tl.int64)
    x = tl.load(points + wide[:, None] * DIM + dims, mask=ok[:, None] & (dims < DIM), other=0.0)
    first, last = tl.load(first_centroid + run), tl.load(last_centroid + run)
    best = tl.full([BLOCK_P, BLOCK_C], -2.0, tl.float32)  # below every cosine
    step = tl.zeros([BLOCK_P, BLOCK_C], tl.int32)
    for at in range(0, last - first, BLOCK_C):
        slot = at + tl.arange(0, BLOCK_C)
        there = slot < last - first
        c_rows = centroids + (first + slot).to(tl.int64)[:, None] * DIM
        c = tl.load(c_rows + dims, mask=there[:, None] & (dims < DIM), other=0.0)
        if MASKED:
            there = there & (tl.load(live + first + slot, mask=there, other=0) != 0)
        cosine = tl.dot(x, tl.trans(c), input_precision="ieee")
        cosine = tl.where(there[None, :], cosine, -2.0)
        better = cosine > best
        best = tl.where(better, cosine, best)
        step = tl.where(better, at, step)
    top, column = tl.max(best, 1, return_indices=True)
    chosen = tl.arange(0, BLOCK_C)[None, :] == column[:, None]
    nearest = tl.sum(tl.where(chosen, step, 0), 1) + column
    tl.store(label + row, nearest, mask=ok)
    tl.store(similarity + row, top, mask=ok)


@triton.jit
def sum_rows(rows, order, start, end, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
             BLOCK_P: tl.constexpr, LISTED: tl.constexpr):  # fmt: skip
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
    points, order, offsets, centroids,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Direction of the mean of one cluster's points; an empty cluster keeps its centroid."""
    node = tl.program_id(0)
    start, end = tl.load(offsets + node), tl.load(offsets + node + 1)
    if start == end:
        return
    dims = tl.arange(0, BLOCK_D)
    total = sum_rows(points, order, start, end, DIM, BLOCK_D, BLOCK_P, True)
    total /= tl.maximum(tl.sqrt(tl.sum(total * total, 0)), 1e-12)
    target = centroids + node.to(tl.int64) * DIM + dims
    tl.store(target, total.to(centroids.dtype.element_ty), mask=dims < DIM)


@triton.jit(do_not_specialize=["tokens", "nodes"])
def describe_kernel(
    keys, values, offsets, centroids, mean_values, variance, tokens, nodes,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Mean key, mean value and key variance of one node, from sorted rows; zero if it is empty."""
    node, head = tl.program_id(0) % nodes, (tl.program_id(0) // nodes).to(tl.int64)
    edge = offsets + head * (nodes + 1) + node
    start, end = tl.load(edge), tl.load(edge + 1)
    dims = tl.arange(0, BLOCK_D)
    k_head, v_head = keys + head * tokens * DIM, values + head * tokens * DIM
    count = tl.maximum(end - start, 1).to(tl.float32)
    mean = sum_rows(k_head, offsets, start, end, DIM, BLOCK_D, BLOCK_P, False) / count
    energy = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for at in range(start, end, BLOCK_P):
        row = at + tl.arange(0, BLOCK_P)
        inside = (row < end)[:, None] & (dims < DIM)
        x = tl.load(k_head + row.to(tl.int64)[:, None] * DIM + dims, mask=inside, other=0.0)
        off = tl.where(inside, x.to(tl.float32) - mean[None, :], 0.0)
        energy += off * off
    value = sum_rows(v_head, offsets, start, end, DIM, BLOCK_D, BLOCK_P, False) / count
    line = head * nodes + node
    dtype = centroids.dtype.element_ty
    tl.store(centroids + line * DIM + dims, mean.to(dtype), mask=dims < DIM)
    tl.store(mean_values + line * DIM + dims, value.to(dtype), mask=dims < DIM)
    tl.store(variance + line, tl.sum(tl.sum(energy, 0), 0) / (count * DIM))
