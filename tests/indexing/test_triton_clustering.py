"""Clustering kernels against the torch steps they replace: tiny under the interpreter."""

import interpreter
import pytest
import torch

from squeezed.config import ClusteringConfig
from squeezed.indexing import clustering, statistics
from squeezed.indexing import kmeans as plain
from squeezed.indexing.triton import kmeans as fused

DEVICE = interpreter.DEVICE
CONFIG = ClusteringConfig(iterations=3)
ROUNDING = 5e-3 if DEVICE == "cuda" else 1e-6  # unit vectors are compared as float16 on a GPU


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1).to(
        DEVICE
    )


def cosines_to_own(points, sizes, clusters, label):
    """Sum of every point's cosine to the mean direction of its cluster."""
    first = (clusters.cumsum(0) - clusters).repeat_interleave(sizes)
    child = first + label
    sums = torch.zeros(int(clusters.sum()), points.shape[1], device=points.device)
    sums.index_add_(0, child, points)
    return (torch.nn.functional.normalize(sums, dim=-1)[child] * points).sum()


def nearest(points, centroids):
    """Label and cosine of the nearest centroid, `[N, n]`, of every problem of one size."""
    (problems, count, dim), most = points.shape, centroids.shape[1]
    sizes = torch.full((problems,), count, device=points.device)
    nodes = torch.full_like(sizes, most)
    runs = fused.Runs.of(sizes, nodes, problems * count, problems * most, dim)
    label, similarity = fused.nearest(points.flatten(0, 1), centroids.flatten(0, 1), runs)
    return label.view(problems, count).long(), similarity.view(problems, count)


@pytest.mark.parametrize("count, most, dim", [(100, 33, 20), (1, 1, 16), (70, 150, 32)])
def test_nearest_equals_torch(count, most, dim):
    points, centroids = unit(2, count, dim), unit(2, most, dim, seed=1)
    label, similarity = nearest(points, centroids)
    live = torch.ones(2, most, dtype=torch.bool, device=DEVICE)
    expected_label, expected = plain.assign(points, centroids, live)
    assert torch.equal(label, expected_label)
    torch.testing.assert_close(similarity, expected, rtol=0, atol=1e-6)


def test_nearest_of_ties_is_the_first():
    points, centroids = unit(1, 40, 16), unit(1, 5, 16, seed=1)
    centroids[0, 3] = centroids[0, 1]
    assert not (nearest(points, centroids)[0] == 3).any()


@pytest.mark.parametrize("duplicates", [0, 60])
def test_cluster_segments_equals_torch(duplicates):
    points = unit(400, 20)
    points[50 : 50 + duplicates] = points[50]  # empties some clusters
    sizes = torch.tensor([100, 0, 7, 150, 143, 0], device=DEVICE)
    clusters = torch.tensor([45, 0, 7, 9, 1, 0], device=DEVICE)
    nodes = int(clusters.sum())
    label = fused.cluster_segments(points, sizes, clusters, nodes, CONFIG)
    expected = plain.cluster_segments(points, sizes, clusters, nodes, CONFIG)
    if DEVICE == "cpu":
        assert torch.equal(label, expected)
    assert (label >= 0).all() and (label < clusters.repeat_interleave(sizes)).all()
    ours, theirs = (cosines_to_own(points, sizes, clusters, x) for x in (label, expected))
    assert ours >= theirs * 0.99


def test_cluster_segments_gives_the_same_tree_twice():
    points = unit(300, 16)
    sizes, clusters = (torch.tensor(x, device=DEVICE) for x in ([300], [20]))
    first, second = (fused.cluster_segments(points, sizes, clusters, 20, CONFIG) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_describe_level_equals_float64(dtype):
    generator = torch.Generator().manual_seed(4)
    keys, values = (torch.randn(2, 200, 20, generator=generator).to(dtype).to(DEVICE) for _ in "kv")
    keys += 3  # a mean far from zero: the variance must survive it
    offsets = torch.tensor([[5, 5, 20, 100, 200], [5, 9, 30, 200, 200]], device=DEVICE)
    level = fused.describe_level(keys, values, offsets, None)
    for head in range(2):
        for node in range(4):
            rows = slice(int(offsets[head, node]), int(offsets[head, node + 1]))
            inside, value = keys[head, rows].double(), values[head, rows].double()
            mean = inside.mean(0) if len(inside) else torch.zeros(20, dtype=torch.float64)
            mean_value = value.mean(0) if len(inside) else torch.zeros(20, dtype=torch.float64)
            variance = inside.var(0, unbiased=False).mean() if len(inside) else torch.tensor(0.0)
            rounding = 2 * torch.finfo(dtype).eps
            for found, exact in (
                (level.centroids[head, node], mean),
                (level.mean_values[head, node], mean_value),
                (level.variance[head, node], variance),
            ):
                torch.testing.assert_close(
                    found.double().cpu(), exact.double().cpu(), rtol=rounding, atol=rounding
                )


def test_cluster_layer_through_the_kernels_equals_torch(monkeypatch):
    generator = torch.Generator().manual_seed(6)
    keys, values = (torch.randn(2, 260, 16, generator=generator).to(DEVICE) for _ in "kv")
    config = ClusteringConfig(levels=(0.05, 0.2), iterations=2, pinned_first=3, pinned_last=10)
    queries = torch.randn(4, 30, 16, generator=generator).to(DEVICE)
    on_cpu = clustering.Steps(plain.cluster_segments, statistics.describe_level)
    monkeypatch.setattr(clustering, "steps_on", lambda device: on_cpu)
    expected = clustering.cluster_layer(keys, values, config, queries)
    on_gpu = clustering.Steps(fused.cluster_segments, fused.describe_level)
    monkeypatch.setattr(clustering, "steps_on", lambda device: on_gpu)
    layer = clustering.cluster_layer(keys, values, config, queries)
    assert torch.equal(layer.positions.sort().values, expected.positions.sort().values)
    for ours, theirs in zip(layer.levels, expected.levels, strict=True):
        assert ours.nodes == theirs.nodes
        if DEVICE == "cpu":
            assert torch.equal(ours.key_offsets, theirs.key_offsets)
            torch.testing.assert_close(ours.centroids, theirs.centroids, rtol=0, atol=ROUNDING)
