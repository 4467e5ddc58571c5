"""Keys -> a tree of clusters, laid out in order: spherical k-means, nested to any depth.

Keys are compared by the cosine of the raw ones, as in the paper, or, given queries of a probe, in
their space and with their values (`squeezed.indexing.space`). Level 1 clusters all keys of a head;
every finer level clusters the keys of each node of the level above. Keys and values are then sorted
by leaf, so a node of any level is one contiguous run of rows (arXiv 2411.09688, section 3.1; the
stored centroid is the mean of the raw, un-normalised keys).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from squeezed.config import ClusteringConfig, SpaceConfig
from squeezed.context.layers import ClusteredLayer, Level
from squeezed.context.rows import Rows
from squeezed.indexing import kmeans, statistics
from squeezed.indexing.finite import check_layer
from squeezed.indexing.kmeans import take_rows
from squeezed.indexing.space import Space, compared_dimensions, place_points
from squeezed.indexing.statistics import value_slope


def cluster_layer(
    keys: Tensor,
    values: Tensor,
    config: ClusteringConfig,
    queries: Tensor | None = None,
    scale: float | None = None,
) -> ClusteredLayer:
    """Cluster one layer's context.

    Args:
        keys, values: `[Hkv, P, D]` in document order, keys after rotary embedding.
        queries: `[Hq, W, D]`, those of a probe, in whose space keys are compared, with values
            beside them, and the variances of the nodes measured; `None` compares raw keys.
        scale: softmax scale of the layer; `None` is the usual one, `D ** -0.5`.

    Returns:
        The layer with its rows sorted; without levels if fewer than two clusters would be left.

    Raises:
        SqueezedError: a NaN or infinity among them.
    """
    check_layer(keys=keys, values=values, queries=queries)
    return cluster_layers([keys], [values], config, [queries], scale)


def cluster_layers(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    config: ClusteringConfig,
    queries: Sequence[Tensor | None],
    scale: float | None = None,
) -> ClusteredLayer:
    """Cluster layers of one shape together, as one layer that has the heads of all in their order.

    Arguments are those of `cluster_layer`, for every layer, all finite; one scale for all.
    """
    scale = keys[0].shape[2] ** -0.5 if scale is None else scale
    tokens = keys[0].shape[1]
    centres = [common_part(k, config.common_part) for k in keys]
    first, pinned = config.pinned(tokens)
    counts = config.counts(tokens)
    if not counts:
        whole = torch.cat(list(keys)), torch.cat(list(values))
        return _unclustered(*whole, torch.cat(centres), scale)
    clustered = slice(first, first + tokens - pinned)
    points, space = _points(
        [k[:, clustered] for k in keys],
        [v[:, clustered] for v in values],
        queries,
        centres,
        config.space,
    )
    rows, offsets, children = build_tree(points, counts, config)
    del points
    positions = _positions(rows + first, tokens, first, pinned)
    if space is not None:
        space = replace(space, energy=space.energy.gather(1, rows))
    sorted_keys, sorted_values = _sorted(keys, positions), _sorted(values, positions)
    centre = torch.cat(centres)
    sorted_keys -= centre[:, None]
    describe = steps_on(positions.device).describe_level
    levels = tuple(
        describe(sorted_keys, sorted_values, level_offsets + pinned, level_children, space)
        for level_offsets, level_children in zip(offsets, children, strict=True)
    )
    behind = sorted_keys[:, pinned:], sorted_values[:, pinned:]
    slope = value_slope(*behind, levels[-1], config.space.plain_share)
    slope = _held(slope, sorted_keys.dtype)
    held = Rows(sorted_keys, sorted_values)
    return ClusteredLayer(held, _narrow(positions), pinned, levels, slope, centre, scale)


def _unclustered(keys: Tensor, values: Tensor, centre: Tensor, scale: float) -> ClusteredLayer:
    heads, tokens, dim = keys.shape
    positions = _narrow(torch.arange(tokens, device=keys.device).repeat(heads, 1))
    flat = keys.new_zeros(heads, dim, dim)
    rows = Rows(keys - centre[:, None], values)
    return ClusteredLayer(rows, positions, tokens, (), flat, centre, scale)


def common_part(keys: Tensor, deviations: float) -> Tensor:
    """What the keys of each head have in common, `[Hkv, D]` in their dtype.

    Their mean where it is more than so many of their deviations, and zero in the other dimensions.
    Beyond two, most keys are between half and twice the mean, and what is left of them needs no
    rounding at all, while keys without a common part stay what they are. Qwen2's biases make keys
    of norm 874 that differ by 18: their means, and logits of thousands, do not fit into 16 bits.

    Args:
        keys: `[Hkv, P, D]`.
    """
    mean = keys.mean(1, dtype=torch.float32)
    energy = vector_norm(keys, dim=1, dtype=torch.float32).square() / keys.shape[1]
    beyond = deviations**2
    small = (beyond + 1) * mean.square() <= beyond * energy
    return mean.masked_fill(small, 0.0).to(keys.dtype)


def _points(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    queries: Sequence[Tensor | None],
    centres: Sequence[Tensor],
    config: SpaceConfig,
) -> tuple[Tensor, Space | None]:
    """Unit vectors of the heads of all layers, `[layers * Hkv, n, D or more]`, and their space.

    In float32 on a CPU, and in float16 on a GPU, which compares nothing wider.
    """
    heads, count, dim = keys[0].shape
    width = dim if queries[0] is None else compared_dimensions(dim, config)
    dtype = torch.float16 if keys[0].is_cuda else torch.float32
    points = keys[0].new_empty(len(keys), heads, count, width, dtype=dtype)
    if queries[0] is None:
        for own, k in zip(points, keys, strict=True):
            own.copy_(torch.nn.functional.normalize(k.float(), dim=-1))
        return points.flatten(0, 1), None
    spaces = [
        place_points(k, v, own_queries, centre, own, config)
        for k, v, own_queries, centre, own in zip(
            keys, values, queries, centres, points, strict=True
        )
        if own_queries is not None
    ]
    parts = zip(*((s.factor, s.middle, s.energy) for s in spaces), strict=True)
    return points.flatten(0, 1), Space(*map(torch.cat, parts))


def _positions(clustered: Tensor, tokens: int, first: int, pinned: int) -> Tensor:
    """Document positions `[H, P]` of all rows: those of the pinned ones, then those given."""
    position = torch.arange(tokens, device=clustered.device)
    front = torch.cat([position[:first], position[tokens - pinned + first :]])
    return torch.cat([front.expand(len(clustered), -1), clustered], 1)


def _sorted(layers: Sequence[Tensor], positions: Tensor) -> Tensor:
    """Rows of all layers' heads `[Hkv, P, D]` at `positions` `[layers * Hkv, P]`, side by side."""
    rows = layers[0].new_empty(*positions.shape, layers[0].shape[2])
    parts = positions.chunk(len(layers)), rows.chunk(len(layers))
    for layer, own, target in zip(layers, *parts, strict=True):
        take_rows(layer, own, target)
    return rows


def _held(slope: Tensor, dtype: torch.dtype) -> Tensor:
    """Slopes in a type that may not hold them: a head's matrix is shrunk as a whole to fit."""
    most = torch.finfo(dtype).max
    largest = slope.abs().amax((1, 2), keepdim=True)
    return (slope * (most / largest.clamp(min=most))).to(dtype)


def _narrow(positions: Tensor) -> Tensor:
    fits = positions.shape[1] <= torch.iinfo(torch.int16).max
    return positions.to(torch.int16 if fits else torch.int32)


class Steps(NamedTuple):
    """The two steps that a GPU takes another way."""

    cluster_segments: Callable[..., Tensor]
    describe_level: Callable[..., Level]


def steps_on(device: torch.device) -> Steps:
    """The steps for a device."""
    if device.type != "cuda":
        return Steps(kmeans.cluster_segments, statistics.describe_level)
    fused = importlib.import_module("squeezed.indexing.triton.kmeans")
    return Steps(fused.cluster_segments, fused.describe_level)


def build_tree(
    points: Tensor, counts: Sequence[int], config: ClusteringConfig
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """Cluster `[Hkv, n, D]` unit vectors into `counts[l]` nodes per head and level.

    Args:
        points: moved into the order of the last level but one, in place.

    Returns:
        The row order `[Hkv, n]`, and for every level the nodes' offsets into that order and into
        the next level's nodes (`None` for the leaves), `[Hkv, C + 1]` int64.
    """
    heads, count, dim = points.shape
    steps, device = steps_on(points.device), points.device
    rows = torch.arange(count, device=device).expand(heads, -1)
    sizes = torch.full((heads, 1), count, device=device)
    every_node = torch.arange(heads * counts[-1], dtype=torch.int32, device=device)
    key_offsets: list[Tensor] = []
    child_offsets: list[Tensor | None] = []
    for nodes in counts:
        clusters = allot(sizes, nodes)
        runs = sizes.view(-1), clusters.view(-1), heads * nodes
        label = steps.cluster_segments(points.view(-1, dim), *runs, config)
        first_child = clusters.view(-1).cumsum(0) - clusters.view(-1)
        child = first_child.repeat_interleave(sizes.view(-1), output_size=heads * count) + label
        child, order = child.int().sort(stable=True)
        order = order.view(heads, count) % count
        rows = rows.gather(1, order)
        ends = torch.searchsorted(child, every_node[: heads * nodes], right=True)
        sizes = ends.diff(prepend=ends.new_zeros(1)).view(heads, nodes)
        if key_offsets:
            child_offsets[-1] = _offsets(clusters)
        key_offsets.append(_offsets(sizes))
        child_offsets.append(None)
        if nodes != counts[-1]:
            _reorder(points, order)
    return rows, key_offsets, child_offsets


def _reorder(points: Tensor, order: Tensor) -> None:
    """Move rows of `[Hkv, n, D]` to the order `[Hkv, n]`, in place, few heads at a time."""
    for own, rows in zip(points.chunk(4), order.chunk(4), strict=True):
        own.copy_(take_rows(own, rows))


def allot(sizes: Tensor, nodes: int) -> Tensor:
    """Share `nodes` children of every head among its parents by size, `[Hkv, C]` -> `[Hkv, C]`.

    Every parent that holds keys gets at least one, none more than it has keys.
    """
    ideal = sizes.double() * nodes / sizes.sum(-1, keepdim=True)
    share = torch.minimum(ideal.floor().long().clamp(min=1), sizes)
    for _ in range(nodes):  # ends after a few rounds: each moves every head towards `nodes`
        missing = nodes - share.sum(-1, keepdim=True)
        if not missing.any():
            break
        wish = (ideal - share) * missing.sign()
        movable = torch.where(missing > 0, share < sizes, share > 1)
        rank = wish.masked_fill(~movable, -torch.inf).argsort(-1, descending=True).argsort(-1)
        share = share + missing.sign() * ((rank < missing.abs()) & movable)
    return share


def _offsets(sizes: Tensor) -> Tensor:
    """`[H, C]` sizes -> `[H, C + 1]` offsets."""
    return torch.nn.functional.pad(sizes.cumsum(-1), (1, 0))
