"""Ways to write keys and values in few bits, as numbers that have lost what the bits lose.

Each takes rows `[n, D]` float32 of one head in document order, and says what is left of them and
what a number costs in bits, scales included. None is quicker than plain rows: they are for
measuring what is lost. Pinned rows are not among them: with every scheme first and last tokens stay
in 16 bits, as IntactKV's pivot tokens do (arXiv 2403.01241).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from squeezed.context.turning import rotation

GROUP = 32
"""Numbers that share a scale and a zero where a scheme has groups."""
GEAR_RANK, GEAR_OUTLIERS = 4, 0.02
"""Of the low-rank part of GEAR, and the share of numbers that it keeps apart."""

Scheme = Callable[[Tensor, int, bool], tuple[Tensor, float]]
"""Rows, bits of a number and whether they are keys -> rows, bits with everything."""


def fp8(rows: Tensor, bits: int, keys: bool) -> tuple[Tensor, float]:
    """Floating point of 8 bits, 4 of them exponent, without scales: a server's usual flag."""
    most = torch.finfo(torch.float8_e4m3fn).max
    return rows.clamp(-most, most).to(torch.float8_e4m3fn).float(), 8.0


def per_token(rows: Tensor, bits: int, keys: bool) -> tuple[Tensor, float]:
    """Even levels between least and largest of `GROUP` dimensions of a token."""
    return _even(rows.T, bits).T, bits + 2 * 16 / GROUP


def kivi(rows: Tensor, bits: int, keys: bool) -> tuple[Tensor, float]:
    """KIVI, arXiv 2402.02750: keys by dimension over `GROUP` tokens, values by token."""
    return (_even(rows, bits), bits + 2 * 16 / GROUP) if keys else per_token(rows, bits, keys)


def gear(rows: Tensor, bits: int, keys: bool) -> tuple[Tensor, float]:
    """GEAR, arXiv 2403.05527: outliers apart, the rest quantised by dimension (keys) or token
    (values), and the error's largest directions."""
    count, dim = rows.shape
    lines = rows if keys else rows.T  # along the first dimension a scale is shared
    most = round(GEAR_OUTLIERS / 2 * len(lines))
    ranks = lines.argsort(0).argsort(0)
    apart = (ranks < most) | (ranks >= len(lines) - most)
    base = lines.masked_fill(apart, 0.0)
    written = _even(base, bits, len(lines)).masked_fill(apart, 0.0) + lines.masked_fill(~apart, 0.0)
    left = lines - written
    u, s, v = torch.svd_lowrank(left, min(GEAR_RANK + 4, *left.shape), niter=4)
    rank = min(GEAR_RANK, len(s))
    written = written + (u[:, :rank] * s[:rank]) @ v[:, :rank].T
    cost = (
        bits + 2 * 16 / len(lines) + 32 * GEAR_OUTLIERS + 16 * rank * (count + dim) / (count * dim)
    )
    return (written if keys else written.T), cost


def rotated(rows: Tensor, bits: int, keys: bool) -> tuple[Tensor, float]:
    """A rotation, and the best levels of normal numbers with one scale a row (TurboQuant's way,
    arXiv 2504.19874)."""
    matrix = rotation(rows.shape[1]).float().to(rows.device)
    return nearest_levels(rows @ matrix.T, bits) @ matrix, bits + 16 / rows.shape[1]


def nearest_levels(rows: Tensor, bits: int) -> Tensor:
    """Rows in the best levels of normal numbers, each with its best scale."""
    levels = normal_levels(bits).to(rows.device)
    scale = rows.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)
    for _ in range(3):
        chosen = levels[torch.bucketize(rows / scale, (levels[1:] + levels[:-1]) / 2)]
        scale = (rows * chosen).sum(-1, keepdim=True) / chosen.square().sum(-1, keepdim=True)
        scale = scale.clamp(min=1e-30)
    return chosen * scale


@cache
def normal_levels(bits: int) -> Tensor:
    """The `2 ** bits` levels with the least squared error of normal numbers (Lloyd, Max)."""
    parts = 1 << 16
    drawn = torch.special.ndtri((torch.arange(parts, dtype=torch.float64) + 0.5) / parts)
    levels = torch.linspace(-2.5, 2.5, 2**bits, dtype=torch.float64)
    for _ in range(400):
        own = torch.bucketize(drawn, (levels[1:] + levels[:-1]) / 2)
        count = torch.bincount(own, minlength=len(levels)).clamp(min=1)
        levels = torch.zeros_like(levels).index_add_(0, own, drawn) / count
    return levels.float()


def _even(rows: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """Even levels between least and largest of every `group` rows of each column."""
    found = []
    for part in rows.split(group):
        low, high = part.amin(0), part.amax(0)
        step = ((high - low) / (2**bits - 1)).clamp(min=1e-30)
        found.append(low + step * ((part - low) / step).round())
    return torch.cat(found)


SCHEMES: dict[str, Scheme] = {
    "fp8": fp8,
    "rtn": per_token,
    "kivi": kivi,
    "gear": gear,
    "rotation": rotated,
}
"""Those of the field; `squeezed.methods.quantised` has ours besides."""
