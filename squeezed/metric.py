"""Observed queries -> the space in which keys that all queries see alike lie close together.

Two keys matter as far apart as their logits are: `s q.(k - k')`, whatever their cosine is. So keys
are clustered in a space whose squared distances are the mean square of that difference over the
probe's queries, mixed with the plain distance, for questions differ from a probe. A cluster that is
not read is replaced by its mean value, so values lie beside the keys there.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import normalize

PLAIN_SHARE = 0.35
"""Part of the plain distance in the mixed one (DESIGN.md)."""

VALUE_WEIGHT = 0.3
"""Root mean square distance between values, where that between keys is 1 (DESIGN.md)."""

VALUE_DIMENSIONS = 0.25
"""Dimensions that values get, as a share of the keys'; all of them were no better."""


def query_space(keys: Tensor, queries: Tensor) -> Tensor:
    """Keys `[Hkv, n, D]` in the space of their group's queries `[Hq, W, D]`, float32.

    Queries count by direction, so that no query head of a group rules by its norm, and the metric's
    trace is `D`, so that a variance in this space is on the scale of the raw keys'.
    """
    heads, _, dim = keys.shape
    direction = normalize(queries.float(), dim=-1).unflatten(0, (heads, -1)).flatten(1, 2)
    seen = direction.mT @ direction * (dim / direction.shape[1])
    plain = torch.eye(dim, device=keys.device)
    metric = (1 - PLAIN_SHARE) * seen + PLAIN_SHARE * plain
    return keys.float() @ torch.linalg.cholesky(metric)


def beside_values(compared: Tensor, values: Tensor) -> Tensor:
    """Keys in the queries' space with their values `[Hkv, n, D]` beside them, `[Hkv, n, D + r]`.

    Values are projected to `r` random directions, the same ones every time: distances stay what
    they are to a few per cent of a key's.
    """
    dim = values.shape[-1]
    kept = max(1, round(VALUE_DIMENSIONS * dim))
    axes = _random_axes(dim, kept).to(values.device)
    projected = (values.float() - values.float().mean(1, keepdim=True)) @ axes
    weight = VALUE_WEIGHT * (_spread(compared) / _spread(projected).clamp(min=1e-20)).sqrt()
    return torch.cat([compared, weight * projected], -1)


@cache
def _random_axes(dim: int, kept: int) -> Tensor:
    """`[dim, kept]` orthonormal columns, the same ones every time and for every layer."""
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(dim, kept, generator=generator)).Q


def _spread(rows: Tensor) -> Tensor:
    """Mean squared distance of `[Hkv, n, D]` from their mean, `[Hkv, 1, 1]`."""
    return rows.var(1, correction=0).sum(-1)[:, None, None]
