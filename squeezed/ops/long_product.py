"""Products of matrices that are much longer than wide, summed over their length."""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 2048
"""Length of a piece that one product takes; a GPU runs the pieces side by side."""


def long_product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` for `[H, M, K]` and `[H, K, N]` with a long `K`, float32.

    A GPU's library gives one product to few multiprocessors, however long it is: ten times slower.
    """
    pieces = left.shape[2] // PIECE if left.is_cuda else 0
    if pieces < 2:
        return torch.bmm(left, right).float()
    whole = pieces * PIECE
    cut = left[..., :whole].unflatten(2, (pieces, PIECE)).transpose(1, 2).flatten(0, 1)
    found = torch.bmm(cut, right[:, :whole].unflatten(1, (pieces, PIECE)).flatten(0, 1))
    total = found.unflatten(0, (left.shape[0], pieces)).sum(1, dtype=torch.float32)
    return total + torch.bmm(left[..., whole:], right[:, whole:]).float()
