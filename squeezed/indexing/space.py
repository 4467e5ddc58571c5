"""Observed queries -> the space in which keys that all queries see alike lie close together.

Two keys matter as far apart as their logits are: `s q.(k - k')`, whatever their cosine is. So keys
are clustered in a space whose squared distances are the mean square of that difference over the
probe's queries, mixed with the plain distance, for questions differ from a probe. A cluster that is
not read is replaced by its mean value, so values lie beside the keys there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import normalize

from squeezed.config import SpaceConfig
from squeezed.indexing.products import mapped_rows
from squeezed.indexing.rounding import SUM_ROUNDING, real_variance


@dataclass(frozen=True)
class Space:
    """The queries' space, and how far from the middle the keys lie there.

    Attributes:
        factor: `[Hkv, D, D]` float32, raw keys to compared ones.
        middle: `[Hkv, 1, D]`, the mean compared key, of keys relative to their layer's centre.
        energy: `[Hkv, n]`, mean square over dimensions of every compared key's way from it.
    """

    factor: Tensor
    middle: Tensor
    energy: Tensor


def compared_dimensions(dim: int, config: SpaceConfig) -> int:
    """Dimensions of what is clustered: the keys' own and those that values get."""
    return dim + max(1, round(config.value_dimensions * dim))


def place_points(
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    centre: Tensor,
    points: Tensor,
    config: SpaceConfig,
) -> Space:
    """Write the directions of keys in the queries' space, with their values beside them.

    Args:
        keys, values: `[Hkv, n, D]`.
        queries: `[Hq, W, D]`.
        centre: `[Hkv, D]`, to which the layer's keys will be relative.
        points: `[Hkv, n, compared_dimensions]`, filled with unit vectors.
    """
    dim = keys.shape[2]
    factor = space_factor(queries, len(keys), config.plain_share)
    compared = mapped_rows(keys, factor)
    middle = compared.mean(1, keepdim=True)
    compared -= middle
    away = vector_norm(compared, dim=-1).square_()
    rounding = (SUM_ROUNDING * vector_norm(middle, dim=-1)).square_()
    away.masked_fill_(away <= rounding, 0.0)  # equal keys
    beside = weighted_values(values, away.mean(1), config)
    compared += _in_sight(middle, away.mean(1), config.farthest)
    length = torch.hypot(vector_norm(compared, dim=-1), vector_norm(beside, dim=-1))
    shrink = length.clamp_(min=1e-12).reciprocal_()[..., None]
    torch.mul(compared, shrink, out=points[..., :dim])
    torch.mul(beside, shrink, out=points[..., dim:])
    return Space(factor, middle - centre[:, None].float() @ factor, away.div_(dim))


def _in_sight(middle: Tensor, variance: Tensor, farthest: float) -> Tensor:
    """The mean compared key, drawn near where it is so far off that keys point all the same way.

    From ten deviations away directions already tell keys apart by their distance alone; from fifty
    the 11 bits of a float16 hardly do.

    Args:
        middle: `[Hkv, 1, D]`.
        variance: `[Hkv]`, mean squared distance of the compared keys from it.
        farthest: deviations that it may be away.
    """
    far = vector_norm(middle, dim=-1, keepdim=True).clamp(min=1e-12)
    return middle * (farthest * variance.sqrt()[:, None, None] / far).clamp(max=1.0)


def space_factor(queries: Tensor, heads: int, plain_share: float) -> Tensor:
    """What maps keys into the space of their group's queries `[Hq, W, D]`, `[Hkv, D, D]` float32.

    Queries count by direction, so that no query head of a group rules by its norm, and the metric's
    trace is `D`, so that a variance in this space is on the scale of the raw keys'.
    """
    dim = queries.shape[2]
    direction = normalize(queries.float(), dim=-1).unflatten(0, (heads, -1)).flatten(1, 2)
    seen = direction.mT @ direction * (dim / direction.shape[1])
    plain = torch.eye(dim, device=queries.device)
    metric = (1 - plain_share) * seen + plain_share * plain  # positive, so nothing to check
    return torch.linalg.cholesky_ex(metric).L


def weighted_values(values: Tensor, key_variance: Tensor, config: SpaceConfig) -> Tensor:
    """What lies beside the keys for their values `[Hkv, n, D]`, `[Hkv, n, r]` float32.

    Values are projected to `r` random directions, the same ones every time: distances stay what
    they are to a few per cent of a key's.

    Args:
        key_variance: `[Hkv]`, mean squared distance of the compared keys from their mean.
    """
    heads, _, dim = values.shape
    axes = _random_axes(dim, compared_dimensions(dim, config) - dim, values.device)
    projected = mapped_rows(values, axes.expand(heads, -1, -1))
    whole = vector_norm(projected, dim=(1, 2)).square()
    projected -= projected.mean(1, keepdim=True)
    variance = real_variance(projected.square().sum((1, 2)), whole) / projected.shape[1]
    weight = config.value_weight * torch.where(variance > 0, key_variance / variance, 0.0).sqrt()
    return projected.mul_(weight[:, None, None])


@cache
def _random_axes(dim: int, kept: int, device: torch.device) -> Tensor:
    """`[dim, kept]` orthonormal columns, the same ones every time and for every layer."""
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(dim, kept, generator=generator)).Q.to(device)
