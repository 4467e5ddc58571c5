"""Captured layers -> trees: in groups on a GPU, in threads on a CPU."""

from __future__ import annotations

from collections.abc import Callable

from squeezed.config import ClusteringConfig
from squeezed.context.captured import CapturedLayer, ObservedLayer
from squeezed.context.layers import ClusteredLayer, WindowLayer
from squeezed.indexing.clustering import cluster_layers
from squeezed.indexing.finite import check_captured
from squeezed.indexing.groups import in_groups, shape_of
from squeezed.indexing.threads import each_in_a_thread


def cluster(
    captured: list[CapturedLayer | None],
    tokens: int,
    config: ClusteringConfig,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[ClusteredLayer | WindowLayer], list[ObservedLayer]]:
    """Every captured layer as a tree, and those with full attention again with their queries.

    Args:
        captured: one per layer, replaced by `None` as soon as it is done: few are held twice.
        tokens: length of the document.
        progress: called with the number of layers done.

    Raises:
        SqueezedError: a NaN or infinity among keys, values or queries.
    """
    check_captured(captured, tokens)
    done: dict[int, ClusteredLayer | WindowLayer] = {
        place: WindowLayer(layer.keys, layer.values, tokens)
        for place, layer in enumerate(captured)
        if layer.queries is None
    }
    full = [place for place in range(len(captured)) if place not in done]
    device = captured[0].keys.device
    shapes = [shape_of(x.keys, x.queries, x.scale) for x in (captured[place] for place in full)]
    groups = [full[own] for own in in_groups(shapes, device)]

    def grow(group: list[int]) -> list[ObservedLayer]:
        own = [captured[place] for place in group]
        queries = [layer.queries if config.query_space else None for layer in own]
        trees = cluster_layers([x.keys for x in own], [x.values for x in own], config, queries)
        for place in group:
            captured[place] = None
        return [ObservedLayer(tree, x.queries, x.scale) for tree, x in zip(trees, own, strict=True)]

    seen: list[ObservedLayer] = []
    grown = each_in_a_thread(grow, groups) if device.type == "cpu" else map(grow, groups)
    for group, found in zip(groups, grown, strict=True):
        done |= {place: observed.layer for place, observed in zip(group, found, strict=True)}
        seen += found
        progress(len(done))
    return [done[place] for place in sorted(done)], seen
