"""Layers of one shape side by side: worked on as one layer that has the heads of all.

All heads are treated alike, so results are those of the layers one by one. A GPU with few keys to
work on waits for instructions; for several layers at once it needs them only once. On a CPU, layers
go side by side by threads (`squeezed.indexing.threads`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from squeezed.context.captured import ObservedLayer
from squeezed.context.layers import ClusteredLayer, Level

KEYS_AT_ONCE = 1 << 20
"""Most keys, of all heads, of layers that are worked on together.

A million, a layer of 128K tokens with 8 KV heads or four of 32K, keep a GPU busy by themselves, and
what is held besides the keys grows with this number.
"""

LAYERS_AT_ONCE = 8
"""Most layers that are worked on together: short documents have histograms of scores as large."""


def shape_of(keys: Tensor, queries: Tensor, scale: float) -> tuple:
    """What layers must agree in: keys `[Hkv, P, D]`, queries `[Hq, W, D]` and scale."""
    return keys.shape, keys.dtype, queries.shape, scale


def in_groups(shapes: Sequence[tuple], device: torch.device) -> list[slice]:
    """Neighbouring layers that are worked on together, of equal shapes (`shape_of`)."""
    groups: list[slice] = []
    for place, shape in enumerate(shapes):
        heads, tokens = shape[0][:2]
        most = 1 if device.type == "cpu" else min(LAYERS_AT_ONCE, KEYS_AT_ONCE // (heads * tokens))
        last = groups[-1] if groups else slice(0, 0)
        if groups and place - last.start < most and shapes[last.start] == shape:
            groups[-1] = slice(last.start, place + 1)
        else:
            groups.append(slice(place, place + 1))
    return groups


def join_in_groups(layers: Sequence[ObservedLayer]) -> list[ObservedLayer]:
    """All layers, those that are worked on together as one."""
    if not layers:
        return []
    shapes = [shape_of(seen.layer.keys, seen.queries, seen.scale) for seen in layers]
    return [join(layers[own]) for own in in_groups(shapes, layers[0].queries.device)]


def join(layers: Sequence[ObservedLayer]) -> ObservedLayer:
    """Layers of one shape as one; views, not copies, where they were clustered together."""
    if len(layers) == 1:
        return layers[0]
    trees = [seen.layer for seen in layers]
    levels = tuple(
        Level(**_joined_fields(level))
        for level in zip(*(tree.levels for tree in trees), strict=True)
    )
    tree = ClusteredLayer(**_joined_fields(trees) | {"pinned": trees[0].pinned, "levels": levels})
    queries = torch.cat([seen.queries for seen in layers])
    return ObservedLayer(tree, queries, layers[0].scale, sum(seen.layers for seen in layers))


def _joined_fields(records: Sequence[ClusteredLayer | Level]) -> dict[str, Tensor | None]:
    columns = {f.name: [getattr(record, f.name) for record in records] for f in fields(records[0])}
    return {
        name: side_by_side(parts) if isinstance(parts[0], Tensor) else None
        for name, parts in columns.items()
    }


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape joined along their first dimension; a view if they lie so in memory."""
    first, size = parts[0], parts[0].numel()
    if all(
        part.is_contiguous()
        and part.data_ptr() == first.data_ptr() + i * size * part.element_size()
        and part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for i, part in enumerate(parts)
    ):
        rows = len(parts) * len(first)
        return first.as_strided((rows, *first.shape[1:]), (size // len(first), *first.stride()[1:]))
    return torch.cat(list(parts))
