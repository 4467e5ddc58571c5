"""Products over very many rows on the GPU: pieces side by side, read where they lie.

`long_product` and `kept_products` have the meaning of the functions of that name in
`squeezed.indexing.products`. Pieces are summed in a fixed order, so a product is always the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 8192
"""Rows that one program sums over: with a million keys, as many programs as multiprocessors."""

MOST_RULES = 30  # bits of an int32


@triton.jit(do_not_specialize=["rows", "length", "queries", "nodes"])
def product_kernel(
    left,
    right,
    owner,
    kept,
    sums,
    masses,
    rows,
    length,
    queries,
    nodes,
    PIECE: tl.constexpr,
    RULES: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One piece of `BLOCK_M` rows of `left` by all columns of `right`, as one rule keeps them.

    `owner [H, K]` says in which node a column of `left` lies, `kept [H, queries, nodes]` which
    rules keep it, as bits. Writes `sums [H, pieces, RULES, M, N]` and `masses` without `N`.
    """
    left, left_head, left_row, left_step = left  # [H, M, K]
    right, right_head, right_row = right  # [H, K, N]
    rule, block = tl.program_id(0) % RULES, tl.program_id(0) // RULES
    piece, head = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, column = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    real = row < rows
    left_rows = left + head * left_head + row.to(tl.int64)[:, None] * left_row
    kept_rows = kept + (head * queries + row % queries)[:, None] * nodes
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    for at in range(0, PIECE, BLOCK_K):
        step = piece * PIECE + at + tl.arange(0, BLOCK_K)
        there = step < length
        both = real[:, None] & there[None, :]
        wide = step.to(tl.int64)
        x = tl.load(left_rows + wide[None, :] * left_step, mask=both, other=0.0)
        if MASKED:
            node = tl.load(owner + head * length + wide, mask=there, other=0)
            bits = tl.load(kept_rows + node[None, :], mask=both, other=0)
            x = tl.where(((bits >> rule) & 1) != 0, x, 0.0).to(x.dtype)
            mass += tl.sum(x.to(tl.float32), 1)
        y_rows = right + head * right_head + wide[:, None] * right_row
        y = tl.load(y_rows + column, mask=there[:, None] & (column < DIM), other=0.0)
        total = tl.dot(x, y, total, input_precision="ieee")
    line = ((head * tl.num_programs(1) + piece) * RULES + rule) * rows + row
    inside = real[:, None] & (column < DIM)
    tl.store(sums + line[:, None] * DIM + column, total, mask=inside)
    if MASKED:
        tl.store(masses + line, mass, mask=real)


def long_product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` for `[H, M, K]` and `[H, K, N]` of one dtype with a long `K`, float32."""
    return _launch(left, right)[0][:, 0]


def kept_products(
    weights: Tensor, values: Tensor, owner: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums of the rows that up to 30 rules keep, and of all rows."""
    rules = len(kept)
    assert rules <= MOST_RULES
    bit = torch.arange(rules, dtype=torch.int32, device=kept.device).view(-1, 1, 1, 1)
    bits = (kept.int() << bit).sum(0, dtype=torch.int32) | (1 << rules)
    return _launch(weights, values, rules + 1, owner.int().contiguous(), bits.contiguous())


def _launch(
    left: Tensor,
    right: Tensor,
    rules: int = 1,
    owner: Tensor | None = None,
    bits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Products `[H, rules, M, N]` and, where `bits` choose, sums of `left` `[H, rules, M, 1]`."""
    (heads, rows, length), dim = left.shape, right.shape[2]
    right = right if right.stride(2) == 1 else right.contiguous()
    queries, nodes = (1, 1) if bits is None else bits.shape[1:]
    masked, width = bits is not None, max(16, triton.next_power_of_2(dim))
    most = 64 if masked or width > 128 else 128  # rows whose leaves are looked up need registers
    block = min(most, max(16, triton.next_power_of_2(rows)))
    pieces = triton.cdiv(length, PIECE)
    sums = left.new_empty(heads, pieces, rules, rows, dim, dtype=torch.float32)
    masses = left.new_empty(heads, pieces, rules, rows, 1, dtype=torch.float32)
    product_kernel[triton.cdiv(rows, block) * rules, pieces, heads](
        (left, *left.stride()),
        (right, *right.stride()[:2]),
        left if owner is None else owner,
        left if bits is None else bits,
        sums,
        masses,
        rows,
        length,
        queries,
        nodes,
        PIECE=PIECE,
        RULES=rules,
        DIM=dim,
        BLOCK_M=block,
        BLOCK_N=width,
        BLOCK_K=32 if masked else 64,
        MASKED=masked,
        num_warps=8 if block * width > 64 * 64 else 4,
        num_stages=3 if masked else 2,
    )
    return sums.sum(1), masses.sum(1)
