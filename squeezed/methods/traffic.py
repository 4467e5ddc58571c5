"""Bytes that a walk down the tree reads: what it visited, counted by `LayerBytes`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from squeezed.attention.reference.lookup import Lookup
from squeezed.attention.scores import NEG_INF, owners
from squeezed.config import FarField
from squeezed.context.bytes import LayerBytes
from squeezed.context.layers import ClusteredLayer, Level
from squeezed.context.rule import SelectionRule


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
    assert level.child_offsets is not None
    parent = owners(level.child_offsets, children.shape[-1])
    index = parent[None, :, None].expand(children.shape)
    counts = torch.zeros(*children.shape[:3], level.nodes, device=children.device)
    return counts.scatter_add(3, index, children.float()) > 0


def tree_bytes(
    layer: ClusteredLayer, found: Lookup, second_order: bool, far_field: FarField
) -> Tensor:
    """Bytes that all query rows read beside kept keys and values, each on its own, `[]`.

    Args:
        second_order: whether variances count in the score.
    """
    parts = LayerBytes.of(layer)
    walks = [(scored.sum(), dropped.sum()) for scored, dropped in visited(layer, found)]
    walked = found.kept.shape[:3].numel()
    index = _of_walks(parts, walks, walked, second_order, far_field)
    return index + parts.opened(found.kept.sum())


def step_bytes(layer: ClusteredLayer, found: Lookup, rule: SelectionRule) -> int:
    """Bytes of the context that one step reads, pinned keys included: what several requests or
    tokens want counts once."""
    parts, heads = LayerBytes.of(layer), layer.kv_heads
    leaves = found.kept.any(2).any(0)
    kept = (leaves * layer.levels[-1].sizes).sum()
    walks = [
        (scored.any(2).any(0).sum(), dropped.any(2).any(0).sum())
        for scored, dropped in visited(layer, found)
    ]
    index = _of_walks(parts, walks, heads, rule.alpha is not None, rule.far_field)
    exact = parts.pinned(heads * layer.pinned) + parts.keys(kept) + parts.opened(leaves.sum())
    return int(exact + index)


def _of_walks(
    parts: LayerBytes,
    walks: Iterable[tuple[Tensor, Tensor]],
    heads: int,
    second_order: bool,
    far_field: FarField,
) -> Tensor:
    """Bytes of scored and dropped nodes of every level, and of so many heads' matrices."""
    nodes = [parts.nodes(*of_level, second_order, far_field) for of_level in walks]
    return torch.stack(nodes).sum().double() + heads * (parts.slope(far_field) + parts.turns())
