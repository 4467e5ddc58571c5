"""Layers worked on together give what they give one by one."""

import weakref

import pytest
import torch

from squeezed.config import BEST, PAPER, ClusteringConfig
from squeezed.context.captured import CapturedLayer, ObservedLayer, handed_over
from squeezed.indexing import groups as together
from squeezed.indexing.build import cluster
from squeezed.indexing.calibrate import calibrate
from squeezed.indexing.clustering import cluster_layer, cluster_layers
from squeezed.indexing.forest import Forest
from squeezed.indexing.groups import in_groups
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


def forest(layers_in=(5,), of=None):
    """Layers of which so many each are clustered as one."""
    keys, values, queries = drawn(sum(layers_in)) if of is None else of
    joined, first = [], 0
    for count in layers_in:
        own = slice(first, first + count)
        tree = cluster_layers(keys[own], values[own], ClusteringConfig(), queries[own], 0.25)
        joined.append(ObservedLayer(tree, torch.cat(queries[own])))
        first += count
    return Forest(tuple(joined), tuple(layers_in))


def assert_equal(found, expected):
    for ours, theirs in zip(found.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("query_space", [True, False])
def test_trees_of_layers_clustered_together_are_those_of_each(query_space):
    keys, values, queries = drawn()
    queries = queries if query_space else [None] * len(keys)
    together = cluster_layers(keys, values, ClusteringConfig(), queries)
    for place, alone in enumerate(zip(keys, values, queries, strict=True)):
        expected = cluster_layer(*alone[:2], ClusteringConfig(), alone[2])
        found = together.of_heads(slice(2 * place, 2 * place + 2))
        assert found.positions.equal(expected.positions)
        assert_equal(found, expected)


@pytest.mark.parametrize("preset", [PAPER, BEST], ids=lambda preset: preset.name)
def test_calibrations_of_joined_layers_are_those_of_each(preset):
    keys, values, queries = drawn()
    queries = (*queries[:3], queries[3] * 4, queries[4])  # outputs of another norm
    found = calibrate(forest((3, 2), (keys, values, queries)), preset, BUDGETS)
    expected = calibrate(forest((1,) * 5, (keys, values, queries)), preset, BUDGETS)
    for name in ("per_token", "per_block", "alpha", "far_alpha"):
        for ours, theirs in zip(getattr(found, name), getattr(expected, name), strict=True):
            if theirs is None:
                assert ours is None
            else:
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_documents_too_short_to_cluster_join_as_well():
    drawn_layers = drawn(layers=2, tokens=100)
    short = forest((2,), drawn_layers)
    joined = short.joined[0].layer
    assert joined.levels == () and len(short.layers()) == 2
    torch.testing.assert_close(joined.keys + joined.centre[:, None], torch.cat(drawn_layers[0]))
    assert calibrate(short, BEST, BUDGETS).rule(1, 0.1, True).log_thresholds.shape == (0, 2)


def test_layers_of_a_forest_are_views_in_their_order():
    trees = forest((1, 2))
    assert trees.layer_of_head.tolist() == [0, 0, 1, 1, 2, 2] and trees.heads == [2, 4]
    for place, seen in enumerate(trees.layers()):
        whole = trees.joined[min(place, 1)]
        half = slice(2, 4) if place == 2 else slice(0, 2)
        for own, of_all in zip(seen.layer.tensors(), whole.layer.tensors(), strict=True):
            assert own.data_ptr() == of_all[half].data_ptr() and own.equal(of_all[half])
        group = slice(6, 12) if place == 2 else slice(0, 6)
        assert seen.queries.equal(whole.queries[group]) and seen.scale == 0.25


def test_what_was_found_for_joined_layers_comes_apart_by_layer():
    found = forest((1, 2)).apart([torch.arange(6.0), torch.arange(12.0).view(1, 12)])
    assert [own.flatten().tolist() for own in found] == [
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5],
        [6, 7, 8, 9, 10, 11],
    ]
    assert forest((1, 2)).apart([None, None]) == [None, None, None]


def test_only_the_tree_holds_a_layer_that_was_handed_over():
    layers = [CapturedLayer(k, v, q, 0.25) for k, v, q in zip(*drawn(3), strict=True)]
    alive = [weakref.ref(layer.keys) for layer in layers]
    counts = []
    cluster(
        handed_over(layers),
        700,
        ClusteringConfig(),
        lambda done: counts.append((done, held(alive))),
    )
    assert counts[-1] == (3, 0) and layers == []


def held(references):
    return sum(reference() is not None for reference in references)


def test_layers_in_a_list_of_the_caller_stay_there():
    layers = [CapturedLayer(k, v, q, 0.25) for k, v, q in zip(*drawn(2), strict=True)]
    trees, _ = cluster(layers, 700, ClusteringConfig())
    assert len(layers) == 2 and all(isinstance(layer, CapturedLayer) for layer in layers)
    again, _ = cluster(layers, 700, ClusteringConfig())
    assert all(a.keys.equal(b.keys) for a, b in zip(trees, again, strict=True))


def test_groups_hold_layers_of_one_shape_and_a_bounded_number_of_keys(monkeypatch):
    monkeypatch.setattr(together, "KEYS_AT_ONCE", 3000)
    few, many = (((2, tokens, 8),) for tokens in (500, 4000))
    shapes = [few, few, few, few, many, many, few]
    found = [(own.start, own.stop) for own in in_groups(shapes, GPU)]
    assert found == [(0, 3), (3, 4), (4, 5), (5, 6), (6, 7)]
    assert len(in_groups(shapes, torch.device("cpu"))) == len(shapes)
    monkeypatch.setattr(together, "LAYERS_AT_ONCE", 2)
    assert [own.stop for own in in_groups(shapes[:4], GPU)] == [2, 4]
    assert in_groups([], GPU) == []
