"""The steps of clustering in plain PyTorch: k-means inside runs of rows, statistics of nodes.

`squeezed.indexing.triton.kmeans` has the same for a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from squeezed.config import ClusteringConfig

CHUNK_SCORES = 1 << 22
"""Most similarities (points times clusters) held at once."""

CHUNK_POINTS = 1 << 13
"""Most padded points that the k-means problems of one batch may hold together.

Small batches hold runs of similar length: the demo's layers took 30 % less than with `1 << 17`.
"""


def cluster_segments(
    points: Tensor, sizes: Tensor, clusters: Tensor, nodes: int, config: ClusteringConfig
) -> Tensor:
    """k-means inside every run of rows: label of each row within its run, `[n]` int64.

    Runs of similar size are padded to the longest and solved as one batch, so memory is bounded
    and no point is compared with another run's centroids.

    Args:
        points: `[n, D]` unit vectors, one run after the other.
        sizes, clusters: `[S]` int64, points and clusters of each run.
        nodes: clusters in all, for which a GPU would have to be waited.
    """
    labels = sizes.new_zeros(len(points))
    starts = sizes.cumsum(0) - sizes
    by_size = sizes.argsort(descending=True, stable=True)
    lengths = sizes[by_size].tolist()
    done = 0
    while done < len(lengths) and lengths[done] > 0:
        batch = by_size[done : done + max(1, CHUNK_POINTS // lengths[done])]
        column = torch.arange(lengths[done], device=points.device)
        valid = column < sizes[batch, None]
        inside = column.minimum(sizes[batch, None] - 1).clamp(min=0)
        member = (starts[batch, None] + inside).clamp(max=len(points) - 1)  # the last may be empty
        padded = points.index_select(0, member.flatten()).view(*member.shape, -1)
        padded.masked_fill_(~valid[..., None], 0.0)
        label = spherical_kmeans(padded, valid, clusters[batch], config.iterations)
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
    first = torch.arange(problems, device=points.device)[:, None] * most
    centroids = take_rows(points, seeds(valid, clusters, slot))
    for _ in range(iterations):
        label, similarity = assign(points, centroids, live)
        cluster = (label + first).flatten()
        sums = points.new_zeros(problems * most, dim).index_add_(0, cluster, points.flatten(0, 1))
        sums = sums.view(problems, most, dim)
        filled = torch.bincount(cluster, valid.flatten().float(), problems * most)
        empty = (filled.view(problems, most) == 0) & live
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
    labels, similarities = [], []
    handicap = None if live.all() else torch.where(live, 0.0, -4.0)[:, None].to(points.dtype)
    for chunk in points.split(max(1, CHUNK_SCORES // per_row), dim=1):
        scores = torch.bmm(chunk, centroids.mT)
        if handicap is not None:
            scores.add_(handicap)
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


def take_rows(tensor: Tensor, rows: Tensor, out: Tensor | None = None) -> Tensor:
    """Rows `[H, m]` of `[H, n, D]`, whole rows at a time, `[H, m, D]`; into `out` if it is given.

    Heads may lie apart, as in a buffer with room for more rows: nothing but the rows is copied.
    """
    heads, count, dim = tensor.shape
    if tensor.stride(2) != 1 or tensor.stride(0) % tensor.stride(1):
        tensor = tensor.contiguous()
    apart = tensor.stride(0) // tensor.stride(1)
    flat = tensor.as_strided(((heads - 1) * apart + count, dim), tensor.stride()[1:])
    first = torch.arange(heads, device=rows.device)[:, None] * apart
    flat_out = None if out is None else out.view(-1, dim)
    taken = torch.index_select(flat, 0, (rows + first).flatten(), out=flat_out)
    return taken.view(heads, -1, dim)
