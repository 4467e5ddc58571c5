"""Layers worked on together give what they give one by one."""

from dataclasses import replace

import pytest
import torch

from squeezed.config import BEST, PAPER, ClusteringConfig
from squeezed.context.captured import ObservedLayer
from squeezed.indexing import groups as together
from squeezed.indexing.calibrate import calibrate
from squeezed.indexing.clustering import cluster_layer, cluster_layers
from squeezed.indexing.groups import in_groups, join, join_in_groups, side_by_side
from squeezed.testing.parts import Parts

BUDGETS = (0.05, 0.2)
GPU = torch.device("cuda")


def drawn(layers=5, tokens=700, heads=2, dim=16):
    """Keys, values and queries of several layers, in buffers with room for more tokens."""
    found = []
    for seed in range(layers):
        parts = Parts.of(heads, dim, "cpu", seed)
        keys = parts.keys(tokens + 9, torch.float32)
        values = torch.randn(keys.shape, generator=parts.generator)
        found.append((keys[:, :tokens], values[:, :tokens], parts.queries(70, 3, keys.dtype)[0]))
    return tuple(zip(*found, strict=True))


def observed(trees, queries):
    return [ObservedLayer(tree, own, 0.25) for tree, own in zip(trees, queries, strict=True)]


def assert_equal(found, expected):
    for ours, theirs in zip(found.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("query_space", [True, False])
def test_trees_of_layers_clustered_together_are_those_of_each(query_space):
    keys, values, queries = drawn()
    queries = queries if query_space else [None] * len(keys)
    for found, *alone in zip(
        cluster_layers(keys, values, ClusteringConfig(), queries),
        keys,
        values,
        queries,
        strict=True,
    ):
        expected = cluster_layer(alone[0], alone[1], ClusteringConfig(), alone[2])
        assert found.positions.equal(expected.positions)
        assert_equal(found, expected)


@pytest.mark.parametrize("preset", [PAPER, BEST], ids=lambda preset: preset.name)
def test_calibrations_of_joined_layers_are_those_of_each(preset, monkeypatch):
    keys, values, queries = drawn()
    seen = observed(cluster_layers(keys, values, ClusteringConfig(), queries), queries)
    seen[3] = replace(seen[3], queries=seen[3].queries * 4)  # outputs of another norm
    expected = calibrate(seen, preset, BUDGETS)
    monkeypatch.setattr(
        "squeezed.indexing.calibrate.join_in_groups",
        lambda layers: [join(layers[:3]), join(layers[3:])],
    )
    found = calibrate(seen, preset, BUDGETS)
    for name in ("per_token", "per_block", "alpha", "far_alpha"):
        for ours, theirs in zip(getattr(found, name), getattr(expected, name), strict=True):
            if theirs is None:
                assert ours is None
            else:
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_documents_too_short_to_cluster_join_as_well():
    keys, values, queries = drawn(layers=2, tokens=100)
    seen = observed(cluster_layers(keys, values, ClusteringConfig(), queries), queries)
    joined = join(seen)
    assert joined.layers == 2 and joined.layer.levels == ()
    centre = joined.layer.centre[:, None]
    torch.testing.assert_close(joined.layer.keys + centre, torch.cat(keys))


def test_layers_clustered_together_join_without_a_copy():
    keys, values, queries = drawn(layers=3)
    trees = cluster_layers(keys, values, ClusteringConfig(), queries)
    tree = join(observed(trees, queries)).layer
    for whole, first, last in zip(
        tree.tensors(), trees[0].tensors(), trees[-1].tensors(), strict=True
    ):
        assert whole.data_ptr() == first.data_ptr() and whole[-len(last) :].equal(last)
        assert whole[-len(last) :].data_ptr() == last.data_ptr()
    apart = [trees[0], trees[2]]
    assert join(observed(apart, queries[:2])).layer.keys.equal(torch.cat([t.keys for t in apart]))


def test_only_neighbours_of_one_shape_lie_side_by_side():
    rows = torch.arange(24.0).view(6, 4)
    for parts in ([rows[:2], rows[4:]], [rows[2:4], rows[:2]], [rows[:3, :2], rows[3:, :2]]):
        assert side_by_side(parts).equal(torch.cat(parts))
    assert side_by_side([rows[:3], rows[3:]]).data_ptr() == rows.data_ptr()


def test_groups_hold_layers_of_one_shape_and_a_bounded_number_of_keys(monkeypatch):
    monkeypatch.setattr(together, "KEYS_AT_ONCE", 3000)
    few, many = (((2, tokens, 8),) for tokens in (500, 4000))
    shapes = [few, few, few, few, many, many, few]
    found = [(own.start, own.stop) for own in in_groups(shapes, GPU)]
    assert found == [(0, 3), (3, 4), (4, 5), (5, 6), (6, 7)]
    assert len(in_groups(shapes, torch.device("cpu"))) == len(shapes)
    monkeypatch.setattr(together, "LAYERS_AT_ONCE", 2)
    assert [own.stop for own in in_groups(shapes[:4], GPU)] == [2, 4]
    assert in_groups([], GPU) == [] and join_in_groups([]) == []
