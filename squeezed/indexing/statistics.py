"""Statistics of sorted rows: mean keys, mean values, variances, and how values follow keys."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import vector_norm

from squeezed.context.layers import Level
from squeezed.indexing.products import long_product
from squeezed.indexing.rounding import ROUNDING, SUM_ROUNDING, real_variance
from squeezed.indexing.space import Space


def value_slope(keys: Tensor, values: Tensor, leaves: Level, plain_share: float) -> Tensor:
    """Covariance of values and keys inside the leaves, over the keys' variance there.

    A query tilts the weights inside a cluster towards the keys it likes: to first order their mean
    value moves by the covariance times `s q`. One matrix per head, scaled by a node's variance,
    stands for all of its nodes: the dipole of the far field. What chance and rounding alone would
    give is taken off (positive-part shrinkage), so that few keys give no slope, nor do leaves whose
    keys or values are equal to rounding.

    Args:
        keys, values: `[Hkv, n, D]`, the clustered rows in the order of `leaves`.
        plain_share: of the plain distance in that of the space: no space has less variance.

    Returns:
        `[Hkv, D, D]` float32, value by key dimension.
    """
    count, sizes = keys.shape[1], leaves.sizes.float()[..., None]
    k, v = (rows.mean(1, keepdim=True, dtype=torch.float32) for rows in (keys, values))
    c, m = leaves.centroids.float() - k, leaves.mean_values.float() - v
    inside = long_product(values.mT, keys) - count * (v.mT @ k) - (sizes * m).mT @ c
    k_all, v_all = _square(keys), _square(values)
    k_energy, v_energy = (
        every - count * _square(mean) - _square(sizes.sqrt() * way)
        for every, mean, way in ((k_all, k, c), (v_all, v, m))
    )
    real = (k_energy > ROUNDING * k_all) & (v_energy > ROUNDING * v_all)
    by_chance = k_energy * v_energy / count + _by_rounding(leaves, c, m, k_all, v_all)
    shrink = (1 - by_chance / _square(inside).clamp(min=1e-300)).clamp(min=0)
    variance = (sizes[..., 0] * leaves.variance).sum(-1)
    variance = torch.maximum(variance, plain_share / keys.shape[2] * k_energy)
    scale = torch.where(real, shrink / variance.masked_fill(~real, 1.0), 0.0)
    return inside * scale.float()[:, None, None]


def _square(rows: Tensor) -> Tensor:
    """Sum of squares of `[H, n, D]`, `[H]` float64: their differences must mean something."""
    return vector_norm(rows, dim=2, dtype=torch.float32).double().square().sum(1)


def describe_level(
    keys: Tensor,
    values: Tensor,
    key_offsets: Tensor,
    child_offsets: Tensor | None,
    space: Space | None = None,
) -> Level:
    """Mean key, mean value and variance of every node, in float32, from sorted rows.

    Args:
        keys, values: `[Hkv, P, D]`, sorted by leaf.
        key_offsets, child_offsets: `[Hkv, C + 1]`.
        space: where the variance is measured, if not among raw keys; its energies sorted as well.
    """
    sizes = key_offsets.diff(dim=-1)
    rows = keys[:, int(key_offsets[0, 0]) :].float()
    mean = _segment_mean(rows, sizes)
    if space is None:
        energy, middle = rows.square().mean(-1), mean
    else:
        energy, middle = space.energy, mean @ space.factor - space.middle
    energy = _segment_mean(energy[..., None], sizes)[..., 0]
    return Level(
        mean.to(keys.dtype),
        _segment_mean(values[:, -rows.shape[1] :].float(), sizes).to(values.dtype),
        real_variance(energy - middle.square().mean(-1), energy),
        key_offsets.to(torch.int32),
        None if child_offsets is None else child_offsets.to(torch.int32),
    )


def _segment_mean(rows: Tensor, sizes: Tensor) -> Tensor:
    """Mean of consecutive runs, `[H, n, D]` and `[H, C]` -> `[H, C, D]`; 0 for an empty run.

    Summed in float64, one row after the other: the mean of equal rows is one of them.
    """
    heads, _, dim = rows.shape
    flat = torch.segment_reduce(
        rows.reshape(-1, dim).double(), "sum", lengths=sizes.reshape(-1), unsafe=True
    )
    return (flat.view(heads, -1, dim) / sizes.clamp(min=1)[..., None]).float()


def _by_rounding(leaves: Level, c: Tensor, m: Tensor, k_all: Tensor, v_all: Tensor) -> Tensor:
    """Mean square of the covariance's rounding, `[H]` float64.

    Of the sums in float32, and of the leaves' means: to a type of precision `eps` an element is
    rounded by `eps / sqrt(12)` of itself, root mean square.

    Args:
        c, m: `[H, C, D]`, mean keys and values of the leaves without those of the head.
        k_all, v_all: `[H]`, squares of all keys and values.
    """
    mean_key, mean_value, key, value = (
        vector_norm(x, dim=-1, dtype=torch.float32).double().square()
        for x in (leaves.centroids, leaves.mean_values, c, m)
    )
    crossed = leaves.sizes.double().square() * (mean_key * value + mean_value * key)
    eps = torch.finfo(leaves.centroids.dtype).eps
    return eps**2 / 12 * crossed.sum(-1) + SUM_ROUNDING**2 * k_all * v_all
