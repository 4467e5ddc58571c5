"""The denominators of all query rows: the kernel that adds up shares of them, and their sum."""

from __future__ import annotations

import triton
import triton.language as tl

from squeezed.attention import scores

LOG2E: tl.constexpr = tl.constexpr(scores.LOG2E)


@triton.jit
def lookup_logits(q, nodes, energy, variance, scale):
    """`[rows, nodes]` logits in base 2, the second-order term included."""
    first = tl.dot(q, tl.trans(nodes), input_precision="ieee") * scale
    return (first + energy[:, None] * variance[None, :]) * LOG2E


@triton.jit
def query_energy(q, alpha, scale):
    """`alpha (s |q|)^2 / 2` of every row."""
    wide = q.to(tl.float32)
    return (0.5 * alpha * scale * scale) * tl.sum(wide * wide, 1)


@triton.jit
def _log_sum(peak, mass, logits):
    """Add the columns of `logits` to a running (peak, sum of exp2) of every row."""
    new = tl.maximum(peak, tl.max(logits, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    mass = mass * tl.exp2(peak - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
    return new, mass


@triton.jit
def _node_sizes(level, nodes, head, node, SECOND: tl.constexpr):
    """log2 of the sizes of nodes, `-inf` where there is none, and their key variances."""
    _, variance, key_offsets = level  # [Hkv, C], [Hkv, C + 1]
    head_nodes = head * nodes
    inside = node < nodes
    edge = key_offsets + head_nodes + head + node
    size = tl.load(edge + 1, mask=inside, other=0) - tl.load(edge, mask=inside, other=0)
    variances = tl.zeros_like(size).to(tl.float32)
    if SECOND:
        variances = tl.load(variance + head_nodes + node, mask=inside, other=0.0)
    log_size = tl.log2(tl.maximum(size, 1).to(tl.float32))
    return tl.where(size > 0, log_size, float("-inf")), variances


@triton.jit(do_not_specialize=["rows", "nodes", "splits", "share"])
def normaliser_kernel(
    query,
    level,
    alpha,
    partial,
    rows,
    nodes,
    splits,
    share,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SECOND: tl.constexpr,
):
    """A share of softmax denominators of `BLOCK_R` rows of a head, `partial [B, Hq, Q, splits]`."""
    queries, batch_stride, head_stride, row_stride = query  # [B, Hq, Q, D]
    centroids, _, _ = level  # [Hkv, C, D]
    split = tl.program_id(1)
    tiles_r = tl.cdiv(rows, BLOCK_R)
    head, b = (tl.program_id(0) // tiles_r) % HEADS, tl.program_id(0) // tiles_r // HEADS
    row = (tl.program_id(0) % tiles_r) * BLOCK_R + tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_D)
    kv = (head // GROUP).to(tl.int64)
    q_rows = queries + b.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride
    q_rows += row[:, None].to(tl.int64) * row_stride
    q = tl.load(q_rows + dims, mask=(row < rows)[:, None] & (dims < DIM), other=0.0)
    energy = query_energy(q, tl.load(alpha + head) if SECOND else 0.0, scale)
    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_R], tl.float32)
    node = split * share + tl.arange(0, BLOCK_C)
    log_size, variances = _node_sizes(level, nodes, kv, node, SECOND)
    for at in range(split * share, tl.minimum(split * share + share, nodes), BLOCK_C):
        node = at + tl.arange(0, BLOCK_C)
        c_rows = centroids + (kv * nodes + node[:, None]) * DIM
        c = tl.load(c_rows + dims, mask=(node < nodes)[:, None] & (dims < DIM), other=0.0)
        logits = lookup_logits(q, c, energy, variances, scale) + log_size[None, :]
        peak, mass = _log_sum(peak, mass, logits)
        log_size, variances = _node_sizes(level, nodes, kv, node + BLOCK_C, SECOND)  # a step ahead
    out = partial + ((b * HEADS + head).to(tl.int64) * rows + row) * splits + split
    tl.store(out, peak + tl.log2(mass), mask=row < rows)  # log2(0) = -inf: nothing here


@triton.jit
def normaliser(partial, line, ok, splits, SPLITS: tl.constexpr):
    """Combine the shares of `normaliser_kernel` for the rows `line`."""
    split = tl.arange(0, SPLITS)
    inside = ok[:, None] & (split < splits)
    parts = tl.load(partial + line[:, None] * splits + split, mask=inside, other=float("-inf"))
    peak = tl.max(parts, 1)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    return base + tl.log2(tl.sum(tl.exp2(parts - base[:, None]), 1))
