"""Matrices that turn differences of rows so that few bits hold them.

A rotation spreads what few dimensions hold over all of them, so that one scale and even levels
serve a row (QuaRot, arXiv 2404.00456). It is not the best: a query sees an error `e` of a key as
`q.e`. Of differences `d` with second moment `S`, quantised as `A d` and then a rotation, the square
error of a logit goes with `trace(A S A) trace(A^-1 M A^-1)`, `M` being the second moment of
queries. It is least where `A^2` is the geometric mean of `M` and `S^-1` (Bhatia, Positive Definite
Matrices, chapter 4). For values, of which all directions count alike, `M` is the identity.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

PLAIN_SHARE = 0.2
"""Part of the plain moment in those of queries and differences: a probe is no question."""

SEED = 0x5EED
"""Of the rotation's signs."""


def turning(moments: Tensor, queries: Tensor | None) -> Tensor:
    """What turns levels into differences of rows, as row vectors, float64 `[Hkv, D, D]`.

    Args:
        moments: `[Hkv, D, D]`, second moment of each head's differences, up to a factor.
        queries: `[Hkv, n, D]`, those that a probe asked each head; `None` for values, of which all
            directions count alike.
    """
    inverse = _power(_mixed(moments), -1.0)
    if queries is None:
        squared = _power(inverse, 0.5)
    else:
        seen = _mixed(torch.stack([second_moment([own]) for own in queries]))
        half, back = _power(seen, 0.5), _power(seen, -0.5)
        squared = half @ _power(back @ inverse @ back, 0.5) @ half
    return rotation(moments.shape[-1]).to(moments.device) @ _power(squared, -0.5)


def rotation(dim: int) -> Tensor:
    """Orthonormal `[D, D]` float64 that spreads every dimension over all of them.

    Random signs, then Walsh-Hadamard of the largest power of two that divides `D`, times Hartley of
    what is left.
    """
    power = dim & -dim
    return torch.kron(hadamard(power), hartley(dim // power)) * random_signs(dim) * dim**-0.5


def second_moment(rows: Iterable[Tensor]) -> Tensor:
    """Second moment of rows `[m, D]` that come in parts, float64 `[D, D]`, of rows whose squares
    may overflow or vanish: up to a factor."""
    parts = []
    for part in rows:
        largest = part.abs().amax().double().clamp(min=1e-300)
        unit = (part.double() / largest).float()
        parts.append((largest, unit.mT @ unit))
    most = torch.stack([largest for largest, _ in parts]).amax()
    return torch.stack([(own / most) ** 2 * moment.double() for own, moment in parts]).sum(0)


def _mixed(moment: Tensor) -> Tensor:
    """Scaled to 1 in the mean dimension, and mixed with the same in all of them."""
    dim = moment.shape[-1]
    mean = moment.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    plain = torch.eye(dim, dtype=moment.dtype, device=moment.device)
    scaled = torch.where(mean > 0, moment / mean, plain)
    return (1 - PLAIN_SHARE) * scaled + PLAIN_SHARE * plain


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """Of symmetric positive definite matrices."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return vectors * values.clamp(min=1e-6).pow(exponent)[:, None] @ vectors.mT


@cache
def hadamard(size: int) -> Tensor:
    """`[size, size]` float64 of 1 and -1, entry `(i, j)` by the parity of the bits of `i & j`."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def hartley(size: int) -> Tensor:
    """`[size, size]` float64, entry `(i, j)` the sum of cosine and sine of `2 pi i j / size`."""
    line = torch.arange(size, dtype=torch.float64)
    angle = 2 * torch.pi / size * (line[:, None] * line % size)
    return angle.cos() + angle.sin()


@cache
def random_signs(dim: int) -> Tensor:
    """`[dim]` float64 of 1 and -1, the same everywhere and always.

    Drawn by xorshift, doi 10.18637/jss.v008.i14.
    """
    state, found = SEED, []
    for _ in range(dim):
        state ^= state << 13 & 0xFFFFFFFF
        state ^= state >> 17
        state ^= state << 5 & 0xFFFFFFFF
        found.append(1.0 if state & 1 else -1.0)
    return torch.tensor(found, dtype=torch.float64)
