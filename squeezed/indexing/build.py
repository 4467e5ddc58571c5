"""Captured layers -> trees: in groups on a GPU, in threads on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from squeezed.config import ClusteringConfig
from squeezed.context.captured import CapturedLayer, ObservedLayer
from squeezed.context.layers import ClusteredLayer, WindowLayer
from squeezed.indexing.clustering import cluster_layers
from squeezed.indexing.finite import check_captured
from squeezed.indexing.forest import Forest
from squeezed.indexing.groups import in_groups, shape_of
from squeezed.indexing.threads import each_in_a_thread


def cluster(
    captured: Iterable[CapturedLayer],
    tokens: int,
    config: ClusteringConfig,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[ClusteredLayer | WindowLayer], Forest]:
    """Every layer of the model, and the trees of those with full attention with their queries.

    Args:
        captured: one per layer, let go as soon as its tree stands. Who `handed_over` them
            holds none either, so that few lie in memory twice.
        tokens: length of the document.
        progress: called with the number of layers done.

    Raises:
        SqueezedError: a NaN or infinity among keys, values or queries.
    """
    waiting = dict(enumerate(captured))
    check_captured(waiting.values(), tokens)
    done: dict[int, ClusteredLayer | WindowLayer] = {
        place: WindowLayer(layer.keys, layer.values, tokens)
        for place, layer in waiting.items()
        if layer.queries is None
    }
    full = [place for place in waiting if place not in done]
    device = waiting[0].keys.device
    shapes = [shape_of(x.keys, observed(x), x.scale) for x in (waiting[place] for place in full)]
    groups = [full[own] for own in in_groups(shapes, device)]

    def grow(group: list[int]) -> ObservedLayer:
        own = [waiting.pop(place) for place in group]
        queries = [layer.queries if config.query_space else None for layer in own]
        keys, values = ([getattr(x, name) for x in own] for name in ("keys", "values"))
        tree = cluster_layers(keys, values, config, queries, own[0].scale)
        seen = [observed(layer) for layer in own]
        return ObservedLayer(tree, torch.cat(seen) if len(own) > 1 else seen[0])

    joined: list[ObservedLayer] = []
    for grown in each_in_a_thread(grow, groups) if device.type == "cpu" else map(grow, groups):
        joined.append(grown)
        progress(len(done) + sum(map(len, groups[: len(joined)])))
    forest = Forest(tuple(joined), tuple(map(len, groups)))
    done |= {place: seen.layer for place, seen in zip(full, forest.layers(), strict=True)}
    return [done[place] for place in sorted(done)], forest


def observed(layer: CapturedLayer) -> Tensor:
    """The probe's queries of a layer with full attention."""
    assert layer.queries is not None
    return layer.queries
