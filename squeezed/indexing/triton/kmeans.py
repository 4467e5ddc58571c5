"""Clustering on the GPU: the steps of `squeezed.indexing.clustering` that a GPU does another way.

`cluster_segments` and `describe_level` have the signatures and the meaning of the
functions of that name in `squeezed.indexing.clustering`, which chooses between the two by device.
Sums run over sorted labels in a fixed order, so a build gives the same tree every time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from squeezed.attention.triton.gpus import compiled_or_refused
from squeezed.config import ClusteringConfig
from squeezed.context.layers import Level
from squeezed.indexing.rounding import real_variance
from squeezed.indexing.space import Space
from squeezed.indexing.triton.kernels import assign_kernel, centroid_kernel, describe_kernel


@dataclass(frozen=True)
class Owners:
    """Where the points and centroids of each run lie, seen from one centroid or point, int64.

    Attributes:
        run_of_point: `[N]`.
        first_point, points: `[K]`, of a centroid's run.
        first_node, nodes: `[K]`, the run's centroids.
    """

    run_of_point: Tensor
    first_point: Tensor
    points: Tensor
    first_node: Tensor
    nodes: Tensor

    @staticmethod
    def of(sizes: Tensor, clusters: Tensor, points: int, nodes: int) -> Owners:
        """From points and clusters per run, `[S]` each, and how many there are in all."""
        run = torch.repeat_interleave(clusters, output_size=nodes)
        starts = sizes.cumsum(0) - sizes, sizes, clusters.cumsum(0) - clusters, clusters
        return Owners(
            torch.repeat_interleave(sizes, output_size=points), *torch.stack(starts)[:, run]
        )


@dataclass(frozen=True)
class Runs:
    """Contiguous stretches of points and of centroids, one k-means problem each.

    Attributes:
        start, end: `[S]` int32, points of each run.
        first, last: `[S]` int32, its centroids.
        tile_run, tile_start: `[tiles]` int32, the run of every tile of points and its first point;
            tiles that are not needed start at the end of the last run.
        points_per_tile, centroids_per_step: tile shape of the assignment.
    """

    start: Tensor
    end: Tensor
    first: Tensor
    last: Tensor
    tile_run: Tensor
    tile_start: Tensor
    points_per_tile: int
    centroids_per_step: int

    @staticmethod
    def of(sizes: Tensor, clusters: Tensor, points: int, nodes: int, dim: int) -> Runs:
        """From points and clusters per run, `[S]` each, and how many there are in all, of `dim`
        numbers. Tiles suit a run of mean size, so that nothing waits for the device."""
        end, last = sizes.cumsum(0), clusters.cumsum(0)
        per_tile = min(64 if dim > 256 else 128, _tile(points // len(sizes)))
        tiles_end = ((sizes + per_tile - 1) // per_tile).cumsum(0)
        tile = torch.arange(points // per_tile + len(sizes), device=sizes.device)
        run = torch.searchsorted(tiles_end, tile, right=True)
        before = torch.nn.functional.pad(tiles_end, (1, 0))[run]
        start = end - sizes
        run = run.clamp(max=len(sizes) - 1)
        needed = tile < tiles_end[-1]
        return Runs(
            start=start.int(),
            end=end.int(),
            first=(last - clusters).int(),
            last=last.int(),
            tile_run=run.int(),
            tile_start=torch.where(needed, start[run] + (tile - before) * per_tile, points).int(),
            points_per_tile=per_tile,
            centroids_per_step=min(32 if dim > 256 else 64, _tile(nodes // len(sizes))),
        )


def _tile(count: int) -> int:
    """Rows of a tile for so many, at least what a product takes."""
    return max(16, triton.next_power_of_2(count))


def nearest(points: Tensor, centroids: Tensor, runs: Runs) -> tuple[Tensor, Tensor]:
    """Nearest centroid of every point within its run and the cosine to it, `[N]` each.

    Args:
        points, centroids: `[N, D]` and `[K, D]` unit vectors of one dtype.
    """
    count, dim = points.shape
    label = torch.empty(count, dtype=torch.int32, device=points.device)
    similarity = torch.empty(count, dtype=torch.float32, device=points.device)
    main, rest = _widths(dim)
    assign_kernel[(len(runs.tile_run),)](
        points,
        centroids,
        (runs.end, runs.first, runs.last),
        (runs.tile_run, runs.tile_start),
        label,
        similarity,
        DIM=dim,
        MAIN=main,
        REST=rest,
        BLOCK_P=runs.points_per_tile,
        BLOCK_C=runs.centroids_per_step,
        num_warps=8 if runs.points_per_tile == 128 else 4,
        num_stages=2,
    )
    return label, similarity


def _widths(dim: int) -> tuple[int, int]:
    """Powers of two that hold `dim` numbers, the second zero if the first holds them all."""
    main = max(16, 1 << (dim.bit_length() - 1))
    return main, _tile(dim - main) if dim > main else 0


@compiled_or_refused()
def cluster_segments(
    points: Tensor, sizes: Tensor, clusters: Tensor, nodes: int, config: ClusteringConfig
) -> Tensor:
    """Spherical k-means inside every run of rows: label of each row within its run, `[n]` int64.

    Args:
        points: `[n, D]` unit vectors, one run after the other.
        sizes, clusters: `[S]` int64, points and clusters of each run; `nodes` clusters in all.
    """
    runs = Runs.of(sizes, clusters, len(points), nodes, points.shape[1])
    owners = Owners.of(sizes, clusters, len(points), nodes)
    centroids = points[_seeds(owners)]
    shift = runs.first[owners.run_of_point]
    for _ in range(config.iterations):
        label, similarity = nearest(points, centroids, runs)
        child, order = (label + shift).sort(stable=True)
        offsets = _offsets_of(child, len(centroids))
        _update(points, order, offsets, centroids)
        _refill(points, similarity, offsets, owners, centroids)
    return nearest(points, centroids, runs)[0].long()


def _seeds(owners: Owners) -> Tensor:
    """Points evenly spaced through each run, `[K]`: those of `squeezed.indexing.kmeans.seeds`."""
    slot = torch.arange(len(owners.nodes), device=owners.nodes.device) - owners.first_node
    within = (2 * slot + 1) * owners.points // (2 * owners.nodes)
    return owners.first_point + within.minimum(owners.points - 1)


def _offsets_of(child: Tensor, nodes: int) -> Tensor:
    """Where each node's points start in sorted labels, `[K + 1]` int32."""
    edges = torch.arange(nodes + 1, dtype=child.dtype, device=child.device)
    return torch.searchsorted(child, edges, out_int32=True)


def _update(points: Tensor, order: Tensor, offsets: Tensor, centroids: Tensor) -> None:
    """Move `centroids` to the mean direction of their points, in place."""
    dim = points.shape[1]
    centroid_kernel[(len(centroids),)](
        points,
        order,
        offsets,
        centroids,
        DIM=dim,
        BLOCK_D=triton.next_power_of_2(dim),
        BLOCK_P=16,
        num_warps=2,
    )


def _refill(
    points: Tensor, similarity: Tensor, offsets: Tensor, owners: Owners, centroids: Tensor
) -> None:
    """Move centroids of empty clusters to the points that fit their own cluster worst, in place."""
    empty = offsets[1:] == offsets[:-1]
    if not empty.any():
        return
    worst_first = similarity.argsort(stable=True)
    worst_first = worst_first[owners.run_of_point[worst_first].argsort(stable=True)]
    upto = empty.cumsum(0)
    before = (upto - empty.long())[owners.first_node]  # empty ones in front of the run
    source = owners.first_point + (upto - before - 1).clamp(min=0)
    moved = points[worst_first[source.clamp(max=len(points) - 1)]]
    centroids.copy_(torch.where(empty[:, None], moved, centroids))


@compiled_or_refused()
def describe_level(
    keys: Tensor,
    values: Tensor,
    key_offsets: Tensor,
    child_offsets: Tensor | None,
    space: Space | None = None,
) -> Level:
    """Means and variance of every node, as `squeezed.indexing.statistics` has it."""
    heads, tokens, dim = keys.shape
    nodes = key_offsets.shape[1] - 1
    centroids, mean_values = keys.new_empty(2, heads, nodes, dim)
    variance = torch.empty(heads, nodes, dtype=torch.float32, device=keys.device)
    exact = None if space is None else torch.empty_like(centroids, dtype=torch.float32)
    key_offsets = key_offsets.to(torch.int32).contiguous()
    describe_kernel[(heads * nodes,)](
        keys.contiguous(),
        values.contiguous(),
        (centroids, mean_values, variance, key_offsets),
        (variance if space is None else space.energy, variance if exact is None else exact),
        tokens,
        nodes,
        tokens if space is None else tokens - space.energy.shape[1],
        DIM=dim,
        BLOCK_D=triton.next_power_of_2(dim),
        BLOCK_P=16,
        SPACE=space is not None,
        num_warps=2,
    )
    if space is not None and exact is not None:
        middle = torch.baddbmm(space.middle, exact, space.factor, beta=-1)
        variance = real_variance(variance - middle.square().mean(-1), variance)
    children = None if child_offsets is None else child_offsets.to(torch.int32)
    return Level(centroids, mean_values, variance, key_offsets, children)
