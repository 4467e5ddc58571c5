"""Keys -> a tree of clusters, laid out in order: spherical k-means, nested to any depth.

Keys are compared by the cosine of the raw ones, as in the paper, or, given queries of a probe, in
their space and with their values (`squeezed.metric`). Level 1 clusters all keys of a head; every
finer level clusters the keys of each node of the level above. Keys and values are then sorted by
leaf, so a node of any level is one contiguous run of rows (arXiv 2411.09688, section 3.1; the
stored centroid is the mean of the raw, un-normalised keys).
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from squeezed.config import ClusteringConfig
from squeezed.kmeans import take_rows
from squeezed.metric import beside_values, query_space
from squeezed.ops.long_product import long_product
from squeezed.tree import ClusteredLayer, Level


def cluster_layer(
    keys: Tensor, values: Tensor, config: ClusteringConfig, queries: Tensor | None = None
) -> ClusteredLayer:
    """Cluster one layer's context.

    Args:
        keys, values: `[Hkv, P, D]` in document order, keys after rotary embedding.
        queries: `[Hq, W, D]`, those of a probe, in whose space keys are compared, with values
            beside them, and the variances of the nodes measured; `None` compares raw keys.

    Returns:
        The layer with its rows sorted; without levels if fewer than two clusters would be left.
    """
    heads, tokens, dim = keys.shape
    order, pinned = _pinned_first(tokens, config, keys.device)
    clustered = tokens - pinned
    counts = [max(1, round(share * clustered)) for share in config.levels]
    if counts[-1] < 2:
        positions = _narrow(torch.arange(tokens, device=keys.device).repeat(heads, 1))
        flat = keys.new_zeros(heads, dim, dim)
        return ClusteredLayer(keys.contiguous(), values.contiguous(), positions, tokens, (), flat)
    compared = points = keys[:, order[pinned:]].float()
    if queries is not None:
        compared = query_space(compared, queries)
        points = beside_values(compared, values[:, order[pinned:]])
    points = torch.nn.functional.normalize(points, dim=-1)
    rows, offsets, children = build_tree(points, counts, config)
    positions = torch.cat([order[:pinned].expand(heads, -1), order[pinned:][rows]], 1)
    sorted_keys, sorted_values = take_rows(keys, positions), take_rows(values, positions)
    compared = None if queries is None else take_rows(compared, rows)
    describe = steps_on(keys.device).describe_level
    levels = tuple(
        describe(sorted_keys, sorted_values, level_offsets + pinned, level_children, compared)
        for level_offsets, level_children in zip(offsets, children, strict=True)
    )
    slope = value_slope(sorted_keys[:, pinned:], sorted_values[:, pinned:], levels[-1])
    return ClusteredLayer(
        sorted_keys, sorted_values, _narrow(positions), pinned, levels, slope.to(keys.dtype)
    )


def value_slope(keys: Tensor, values: Tensor, leaves: Level) -> Tensor:
    """Covariance of values and keys inside the leaves, over the keys' variance there.

    A query tilts the weights inside a cluster towards the keys it likes: to first order their mean
    value moves by the covariance times `s q`. One matrix per head, scaled by a node's variance,
    stands for all of its nodes: the dipole of the far field. What chance alone would give is taken
    off (positive-part shrinkage), so that few keys give no slope.

    Args:
        keys, values: `[Hkv, n, D]`, the clustered rows in the order of `leaves`.

    Returns:
        `[Hkv, D, D]` float32, value by key dimension.
    """
    sizes = leaves.sizes.float()[..., None]
    (k, c), (v, m) = _centred(keys, leaves.centroids), _centred(values, leaves.mean_values)
    exact = keys.dtype if keys.is_cuda else torch.float32  # a GPU sums products in float32
    inside = long_product(v.to(exact).mT, k.to(exact)) - long_product((sizes * m).mT, c)
    k_energy, v_energy = (
        rows.square().sum((1, 2)) - (sizes * means.square()).sum((1, 2))
        for rows, means in ((k, c), (v, m))
    )
    by_chance = k_energy * v_energy / keys.shape[1]
    shrink = (1 - by_chance / inside.square().sum((1, 2)).clamp(min=1e-30)).clamp(min=0)
    variance = (sizes[..., 0] * leaves.variance).sum(-1).clamp(min=1e-20)
    return inside * (shrink / variance)[:, None, None]


def _centred(rows: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and means of nodes around the mean row, float32: sums of products stay precise."""
    centre = rows.float().mean(1, keepdim=True)
    return rows.float() - centre, means.float() - centre


def _narrow(positions: Tensor) -> Tensor:
    fits = positions.shape[1] <= torch.iinfo(torch.int16).max
    return positions.to(torch.int16 if fits else torch.int32)


def steps_on(device: torch.device) -> ModuleType:
    """Where the steps for the device live (`cluster_segments`, `describe_level`)."""
    name = "squeezed.ops.triton.clustering" if device.type == "cuda" else "squeezed.kmeans"
    return importlib.import_module(name)


def _pinned_first(tokens: int, config: ClusteringConfig, device) -> tuple[Tensor, int]:
    """Document positions with the pinned ones in front, and how many those are."""
    first = min(config.pinned_first, tokens)
    last = min(config.pinned_last, tokens - first)
    position = torch.arange(tokens, device=device)
    order = torch.cat(
        [position[:first], position[tokens - last :], position[first : tokens - last]]
    )
    return order, first + last


def build_tree(
    points: Tensor, counts: list[int], config: ClusteringConfig
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """Cluster `[Hkv, n, D]` unit vectors into `counts[l]` nodes per head and level.

    Returns:
        The row order `[Hkv, n]`, and for every level the nodes' offsets into that order and into
        the next level's nodes (`None` for the leaves), `[Hkv, C + 1]` int64.
    """
    heads, count, dim = points.shape
    flat, steps = points.reshape(-1, dim), steps_on(points.device)
    rows = torch.arange(heads * count, device=points.device)
    sizes = torch.full((heads, 1), count, device=points.device)
    key_offsets: list[Tensor] = []
    child_offsets: list[Tensor | None] = []
    for nodes in counts:
        clusters = allot(sizes, nodes)
        label = steps.cluster_segments(flat, rows, sizes.view(-1), clusters.view(-1), config)
        first_child = clusters.view(-1).cumsum(0) - clusters.view(-1)
        child = first_child.repeat_interleave(sizes.view(-1)) + label
        rows = rows[child.argsort(stable=True)]
        sizes = child.bincount(minlength=heads * nodes).view(heads, nodes)
        if key_offsets:
            child_offsets[-1] = _offsets(clusters)
        key_offsets.append(_offsets(sizes))
        child_offsets.append(None)
    return rows.view(heads, count) % count, key_offsets, child_offsets


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
