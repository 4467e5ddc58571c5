"""Keys -> a tree of clusters, laid out in order: spherical k-means, nested to any depth.

Keys are compared by the cosine of the raw ones, as in the paper, or, given queries of a probe, in
their space (`squeezed.metric`). Level 1 clusters all keys of a head; every finer level clusters the
keys of each node of the level above. Keys and values are then sorted by leaf, so a node of any
level is one contiguous run of rows (arXiv 2411.09688, section 3.1; the stored centroid is the mean
of the raw, un-normalised keys).
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from squeezed.config import ClusteringConfig
from squeezed.metric import query_space
from squeezed.tree import ClusteredLayer, Level

CHUNK_SCORES = 1 << 22
"""Most similarities (points times clusters) held at once."""

CHUNK_POINTS = 1 << 17
"""Most padded points that the k-means problems of one batch may hold together."""


def cluster_layer(
    keys: Tensor, values: Tensor, config: ClusteringConfig, queries: Tensor | None = None
) -> ClusteredLayer:
    """Cluster one layer's context.

    Args:
        keys, values: `[Hkv, P, D]` in document order, keys after rotary embedding.
        queries: `[Hq, W, D]`, those of a probe, in whose space keys are compared and the variances
            of the nodes measured; `None` compares raw keys.

    Returns:
        The layer with its rows sorted; without levels if fewer than two clusters would be left.
    """
    heads, tokens, _ = keys.shape
    order, pinned = _pinned_first(tokens, config, keys.device)
    clustered = tokens - pinned
    counts = [max(1, round(share * clustered)) for share in config.levels]
    if counts[-1] < 2:
        positions = torch.arange(tokens, device=keys.device, dtype=torch.int32).repeat(heads, 1)
        return ClusteredLayer(keys.contiguous(), values.contiguous(), positions, tokens, ())
    compared = keys[:, order[pinned:]].float()
    if queries is not None:
        compared = query_space(compared, queries)
    points = torch.nn.functional.normalize(compared, dim=-1)
    rows, offsets, children = build_tree(points, counts, config)
    positions = torch.cat([order[:pinned].expand(heads, -1), order[pinned:][rows]], 1)
    pick = positions[..., None].expand(-1, -1, keys.shape[-1])
    sorted_keys, sorted_values = keys.gather(1, pick), values.gather(1, pick)
    levels = tuple(
        steps_on(keys.device).describe_level(
            sorted_keys, sorted_values, level_offsets + pinned, level_children
        )
        for level_offsets, level_children in zip(offsets, children, strict=True)
    )
    if queries is not None:
        compared = compared.gather(1, rows[..., None].expand_as(compared))
        levels = tuple(_with_variance_of(compared, level, pinned) for level in levels)
    return ClusteredLayer(sorted_keys, sorted_values, positions.int(), pinned, levels)


def _with_variance_of(compared: Tensor, level: Level, pinned: int) -> Level:
    """The level with the variance of `compared [Hkv, n, D]`, the keys as queries see them."""
    offsets = level.key_offsets.long() - pinned
    described = steps_on(compared.device).describe_level(compared, compared, offsets, None)
    return replace(level, variance=described.variance)


def steps_on(device: torch.device) -> ModuleType:
    """Where `cluster_segments` and `describe_level` for the device live: in Triton on a GPU."""
    name = "squeezed.ops.triton.clustering" if device.type == "cuda" else __name__
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


def cluster_segments(
    flat: Tensor, rows: Tensor, sizes: Tensor, clusters: Tensor, config: ClusteringConfig
) -> Tensor:
    """k-means inside every run of rows: label of each row within its run, `[rows]` int64.

    Runs of similar size are padded to the longest and solved as one batch, so memory is bounded
    and no point is compared with another run's centroids.
    """
    labels = torch.zeros_like(rows)
    starts = sizes.cumsum(0) - sizes
    by_size = sizes.argsort(descending=True, stable=True)
    lengths = sizes[by_size].tolist()
    done = 0
    while done < len(lengths) and lengths[done] > 0:
        batch = by_size[done : done + max(1, CHUNK_POINTS // lengths[done])]
        column = torch.arange(lengths[done], device=rows.device)
        valid = column < sizes[batch, None]
        inside = column.minimum(sizes[batch, None] - 1).clamp(min=0)
        member = (starts[batch, None] + inside).clamp(max=len(rows) - 1)  # an empty run may end it
        points = flat[rows[member]].masked_fill_(~valid[..., None], 0.0)
        label = spherical_kmeans(points, valid, clusters[batch], config.iterations)
        labels[member[valid]] = label[valid]
        done += len(batch)
    return labels


def spherical_kmeans(points: Tensor, valid: Tensor, clusters: Tensor, iterations: int) -> Tensor:
    """Lloyd's algorithm by cosine for `N` problems at once.

    Args:
        points: `[N, n, D]` unit vectors, zero where padded.
        valid: `[N, n]` bool, False where padded.
        clusters: `[N]` int64, clusters of each problem.

    Returns:
        Label of every point, `[N, n]` int64.
    """
    problems, _, dim = points.shape
    most = int(clusters.max())
    slot = torch.arange(most, device=points.device)
    live = slot < clusters[:, None]
    centroids = points.gather(1, seeds(valid, clusters, slot)[..., None].expand(-1, -1, dim))
    for _ in range(iterations):
        label, similarity = assign(points, centroids, live)
        sums = points.new_zeros(problems, most, dim)
        sums.scatter_add_(1, label[..., None].expand(-1, -1, dim), points)
        filled = points.new_zeros(problems, most).scatter_add_(1, label, valid.to(points.dtype))
        empty = (filled == 0) & live
        centroids = torch.nn.functional.normalize(sums, dim=-1)
        centroids = refill(centroids, empty, points, similarity.masked_fill(~valid, 2.0))
    return assign(points, centroids, live)[0]


def seeds(valid: Tensor, clusters: Tensor, slot: Tensor) -> Tensor:
    """Points evenly spaced through each run, `[N, k]`.

    Measured as good as k-means++ at a fraction of its cost (benchmarks/README.md): neighbours in a
    document have similar keys, so even spacing spreads the seeds. It needs no random numbers.
    """
    spaced = (2 * slot + 1) * valid.sum(-1, keepdim=True) // (2 * clusters[:, None].clamp(min=1))
    return spaced.minimum(valid.sum(-1, keepdim=True) - 1).clamp(min=0)


def assign(points: Tensor, centroids: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest live centroid of every point and the cosine to it, `[N, n]`, in bounded memory."""
    per_row = centroids.shape[0] * centroids.shape[1]
    labels, similarities, all_live = [], [], bool(live.all())
    for chunk in points.split(max(1, CHUNK_SCORES // per_row), dim=1):
        scores = torch.bmm(chunk, centroids.mT)
        if not all_live:
            scores.masked_fill_(~live[:, None], -2.0)
        similarity, label = scores.max(-1)
        labels.append(label)
        similarities.append(similarity)
    return torch.cat(labels, 1), torch.cat(similarities, 1)


def refill(centroids: Tensor, empty: Tensor, points: Tensor, similarity: Tensor) -> Tensor:
    """Move the centroids of empty clusters to the points that fit their own cluster worst."""
    worst = min(int(empty.sum(-1).max()), points.shape[1])
    if worst == 0:
        return centroids
    candidates = similarity.topk(worst, dim=-1, largest=False).indices
    rank = (empty.long().cumsum(-1) - 1).clamp(0, worst - 1)
    moved = points.gather(1, candidates.gather(1, rank)[..., None].expand_as(centroids))
    return torch.where(empty[..., None], moved, centroids)


def describe_level(
    keys: Tensor, values: Tensor, key_offsets: Tensor, child_offsets: Tensor | None
) -> Level:
    """Mean key, mean value and key variance of every node, in float32, from sorted rows."""
    sizes = key_offsets.diff(dim=-1)
    start = int(key_offsets[0, 0])
    rows_keys, rows_values = keys[:, start:].float(), values[:, start:].float()
    centroids = _segment_mean(rows_keys, sizes)
    energy = _segment_mean(rows_keys.square().mean(-1, keepdim=True), sizes)[..., 0]
    variance = (energy - centroids.square().mean(-1)).clamp(min=0)
    return Level(
        centroids.to(keys.dtype),
        _segment_mean(rows_values, sizes).to(values.dtype),
        variance,
        key_offsets.to(torch.int32),
        None if child_offsets is None else child_offsets.to(torch.int32),
    )


def _segment_mean(rows: Tensor, sizes: Tensor) -> Tensor:
    """Mean of consecutive runs, `[H, n, D]` and `[H, C]` -> `[H, C, D]`; 0 for an empty run."""
    heads, _, dim = rows.shape
    flat = torch.segment_reduce(
        rows.reshape(-1, dim).contiguous(), "sum", lengths=sizes.reshape(-1), unsafe=True
    )
    return flat.view(heads, -1, dim) / sizes.clamp(min=1)[..., None]


def _offsets(sizes: Tensor) -> Tensor:
    """`[H, C]` sizes -> `[H, C + 1]` offsets."""
    return torch.nn.functional.pad(sizes.cumsum(-1), (1, 0))
