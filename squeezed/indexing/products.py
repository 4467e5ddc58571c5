"""Products of matrices that a GPU takes as they are: no wider copies, however long they are."""

from __future__ import annotations

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)


def float_product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` for `[H, M, K]` and `[H, K, N]`, float32 from exact products."""
    if left.is_cuda and left.dtype == right.dtype and left.dtype in HALVES:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())


def mapped_rows(rows: Tensor, matrix: Tensor) -> Tensor:
    """`rows @ matrix` for `[H, n, D]` of any type and a float32 `[H, D, N]`, float32.

    A GPU multiplies half-precision rows by the matrix as a sum of two such matrices: what is left
    out is 2^-16 of it.
    """
    if not rows.is_cuda or rows.dtype not in HALVES:
        return torch.bmm(rows.float(), matrix)
    high = matrix.to(rows.dtype)
    low = (matrix - high.float()).to(rows.dtype)
    return float_product(rows, high).add_(float_product(rows, low))


def long_product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` for `[H, M, K]` and `[H, K, N]` with a long `K`, float32.

    A GPU's library gives one product to few multiprocessors, however long it is: ten times slower.
    """
    if not left.is_cuda:
        return torch.bmm(left.float(), right.float())
    from squeezed.indexing.triton import products as fused

    return fused.long_product(left, right)


def kept_products(
    weights: Tensor, values: Tensor, owner: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums of the rows that rules keep, a leaf's rows all or none, and of all rows.

    Args:
        weights: `[Hkv, G * n, R]`; row `g * n + i` belongs to query `i`.
        values: `[Hkv, R, D]` in the dtype of `weights`.
        owner: `[Hkv, R]` int32, the leaf of every row.
        kept: `[S, Hkv, n, C]` bool, the leaves that every rule keeps for every query.

    Returns:
        Weighted sums of the values `[Hkv, S + 1, G * n, D]` and sums of the weights
        `[Hkv, S + 1, G * n, 1]`, float32; the last of `S + 1` is that of all rows.
    """
    if weights.is_cuda:
        from squeezed.indexing.triton import products as fused

        return fused.kept_products(weights, values, owner, kept)
    queries = kept.shape[2]
    place = owner.long()[:, None].expand(-1, queries, -1)
    by_group = weights.unflatten(1, (-1, queries))
    read = torch.empty_like(by_group, memory_format=torch.contiguous_format)  # for every rule
    sums, masses = [], []
    for rule in kept:
        torch.mul(by_group, rule.gather(2, place).to(weights.dtype)[:, None], out=read)
        own = read.flatten(1, 2)
        sums.append(torch.bmm(own, values))
        masses.append(own.sum(-1, keepdim=True))
    sums.append(torch.bmm(weights, values))
    masses.append(weights.sum(-1, keepdim=True))
    return torch.stack(sums, 1), torch.stack(masses, 1)
