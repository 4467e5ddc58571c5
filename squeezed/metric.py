"""Observed queries -> the space in which keys that all queries see alike lie close together.

Two keys matter as far apart as their logits are: `s q.(k - k')`, whatever their cosine is. So keys
are clustered in a space whose squared distances are the mean square of that difference over the
probe's queries, mixed half and half with the plain distance, for questions differ from a probe.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

PLAIN_SHARE = 0.5
"""Part of the plain distance in the mixed one; 0.1 and 0.8 were worse (DESIGN.md)."""


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
