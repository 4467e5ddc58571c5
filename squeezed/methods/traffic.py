"""Bytes that a walk down the tree reads beside the kept keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from squeezed.attention.reference.lookup import Lookup
from squeezed.attention.scores import NEG_INF, owners
from squeezed.context.layers import ClusteredLayer, Level

OFFSET_BYTES = VARIANCE_BYTES = 4  # int32 and float32, as stored


def visited(layer: ClusteredLayer, found: Lookup) -> list[tuple[Tensor, Tensor]]:
    """Scored and dropped nodes of every level, coarse to fine, each `[B, Hkv, N, C]` bool.

    The lookup must have selected per token, so that blocks are query rows.
    """
    sizes = [level.nodes for level in layer.levels]
    dropped = [(part > NEG_INF).any(2) for part in found.far_logits.split(sizes, -1)]
    scored = [dropped[-1] | found.kept]
    for depth in range(len(sizes) - 2, -1, -1):
        opened = _parents(layer.levels[depth], scored[0])
        scored.insert(0, dropped[depth] | opened)
    return list(zip(scored, dropped, strict=True))


def _parents(level: Level, children: Tensor) -> Tensor:
    """Whether any child of each node is set, `[B, Hkv, N, C'] -> [B, Hkv, N, C]`."""
    parent = owners(level.child_offsets, children.shape[-1])
    index = parent[None, :, None].expand(children.shape)
    counts = torch.zeros(*children.shape[:3], level.nodes, device=children.device)
    return counts.scatter_add(3, index, children.float()) > 0


def tree_bytes(layer: ClusteredLayer, found: Lookup, variance: bool, far_field: bool) -> Tensor:
    """Bytes of centroids, offsets, variances and far mean values read by all query rows, `[]`."""
    total = torch.zeros((), dtype=torch.float64, device=layer.keys.device)
    for level, (scored, dropped) in zip(layer.levels, visited(layer, found), strict=True):
        row = level.centroids.shape[-1] * level.centroids.element_size()
        entry = row + OFFSET_BYTES + (VARIANCE_BYTES if variance else 0)
        total += scored.sum() * entry
        if far_field:
            total += dropped.sum() * row
    return total
