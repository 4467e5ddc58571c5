"""Nodes of the tree, scored by query rows: what the first and the walking kernel share."""

import triton
import triton.language as tl

from squeezed.attention.triton.decode.selection import hand_down, log_size
from squeezed.attention.triton.decode.softmax import energy_of, fold_mass, load_rows


@triton.jit
def load_nodes(level, node, live, head, D: tl.constexpr, D_PAD: tl.constexpr, SECOND: tl.constexpr):
    """Mean keys `[N, D_PAD]`, first rows, sizes and variances `[N]`; no load waits for another."""
    centroids, variance, key_offsets, _, nodes = level  # [Hkv, C, D], [Hkv, C], [Hkv, C + 1]
    mean = load_rows(centroids + head.to(tl.int64) * nodes * D, node, live, D, D, D_PAD)
    at = head * (nodes + 1) + node
    start = tl.load(key_offsets + at, mask=live, other=0)
    stop = tl.load(key_offsets + at + 1, mask=live, other=0)
    variances = tl.zeros(node.shape, tl.float32)
    if SECOND:
        variances = tl.load(variance + head * nodes + node, mask=live, other=0.0)
    return mean, start, stop - start, variances


@triton.jit
def node_logits(q, mean, scale_bits):
    """First-order logits `[N, R]` of nodes for query rows `[R, D_PAD]`."""
    return tl.dot(mean, tl.trans(q)) * scale_bits


@triton.jit
def node_scores(first, energy, variances, SECOND: tl.constexpr):
    """Logits `[N, R]` that select, from those of first order."""
    scores = first
    if SECOND:
        scores += energy[None, :] * variances[:, None]
    return scores


@triton.jit
def weigh_nodes(
    q,
    exists,
    row,
    z,
    head,
    split,
    level,
    alpha,
    scale_bits,
    scores,
    parents_of,
    children,
    norms,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    N: tl.constexpr,
    SECOND: tl.constexpr,
    NESTED: tl.constexpr,
):
    """One share of the coarsest nodes: its part of the normaliser, and what selects below it."""
    norm_peaks, norm_masses, splits = norms  # [Z, splits, ROWS] twice
    nodes = level[4]
    child_offsets = level[3] + head * (nodes + 1)  # of [Hkv, C + 1]
    energy = energy_of(q, alpha, head, row, scale_bits, GROUP, SECOND)
    parents_of += z.to(tl.int64) * children  # of [Z, children]
    peak = tl.full(row.shape, float("-inf"), tl.float32)
    mass = tl.zeros(row.shape, tl.float32)
    for start in range(split * N, nodes, splits * N):
        node = start + tl.arange(0, N)
        live = node < nodes
        mean, _, size, variances = load_nodes(level, node, live, head, D, D_PAD, SECOND)
        if NESTED:  # asked for now, needed behind the scores
            child = tl.load(child_offsets + node, mask=live, other=0)
            end = tl.load(child_offsets + node + 1, mask=live, other=0)
        score = node_scores(node_logits(q, mean, scale_bits), energy, variances, SECOND)
        score = tl.where((size > 0)[:, None], score, float("-inf"))
        place = (z.to(tl.int64) * nodes + node)[:, None] * ROWS + row[None, :]
        tl.store(scores + place, score, mask=live[:, None] & exists[None, :])
        if NESTED:
            hand_down(parents_of, child, end, node, 8)
        peak, mass, _, _ = fold_mass(peak, mass, score + log_size(size)[:, None], 0)
    at = (z * splits + split) * ROWS + row
    tl.store(norm_peaks + at, peak, mask=exists)
    tl.store(norm_masses + at, mass, mask=exists)
