"""Bytes read beside keys and values, against a walk of the tree in plain loops."""

import pytest
import torch

from methods.contexts import KV_HEADS, random_call, random_context
from squeezed.attention.reference.lookup import lookup
from squeezed.methods import create


def walk(layer, rule, query):
    """Nodes scored and dropped per level by one query token, in loops."""
    found = lookup(query, layer, rule)
    sizes = [level.nodes for level in layer.levels]
    far = found.far_logits.isfinite().any(2)[0, :, 0].split(sizes, -1)
    scored = dropped = 0
    for head in range(KV_HEADS):
        alive = [i for i in range(sizes[0]) if layer.levels[0].sizes[head, i] > 0]
        for depth, level in enumerate(layer.levels):
            gone = [i for i in alive if far[depth][head, i]]
            scored, dropped = scored + len(alive), dropped + len(gone)
            if level.child_offsets is None:
                break
            below = []
            for node in set(alive) - set(gone):
                start, end = (int(x) for x in level.child_offsets[head, node : node + 2])
                below += [c for c in range(start, end) if layer.levels[depth + 1].sizes[head, c]]
            alive = below
    return scored, dropped


@pytest.mark.parametrize("preset", ["paper", "best"])
def test_squeezed_index_bytes_are_the_nodes_of_the_walk(preset):
    layers = create(preset, implementation="reference").prepare(random_context(), 0.1)
    calls = [random_call(batch=1, rows=1, seed=seed) for seed in range(3)]
    for layer in layers:
        expected = 0
        for call in calls:
            scored, dropped = walk(layer.layer, layer.token, call.query)
            row = 32 * 4
            entry = row + 4 + (4 if layer.token.alpha is not None else 0)
            expected += scored * entry
            if layer.token.far_field == "second_order":
                expected += dropped * row + KV_HEADS * 32 * row
        together = torch.cat([call.query for call in calls])
        assert layer.index_bytes(together) == expected


def test_quest_index_bytes_are_two_bounds_per_page_and_head():
    call = random_call(batch=2, rows=3)
    layer = create("quest").prepare(random_context(), 0.1)[0]
    pages = -(-280 // 16)
    assert layer.index_bytes(call.query) == 6 * KV_HEADS * pages * 2 * 32 * 4


def test_routing_index_bytes_are_all_leaf_centroids():
    layer = create("routing").prepare(random_context(), 0.1)[0]
    leaves = int((layer.layer.levels[-1].sizes > 0).sum())
    assert layer.index_bytes(random_call(batch=1, rows=2).query) == 2 * leaves * 32 * 4


def test_retrieval_flat_index_bytes_are_every_key_per_query_head():
    pytest.importorskip("faiss")
    layer = create("retrieval", index="flat").prepare(random_context(), 0.1)[0]
    found = layer.index_bytes(random_call(batch=1, rows=1).query)
    assert found == 4 * 280 * 32 * 4


def test_retrieval_graph_index_bytes_stay_below_the_exact_search():
    pytest.importorskip("faiss")
    layer = create("retrieval").prepare(random_context(tokens=3000), 0.01)[0]
    found = layer.index_bytes(random_call(batch=1, rows=1).query)
    assert 0 < found < 4 * 2980 * 32 * 4


@pytest.mark.parametrize("name", ["dense", "snapkv", "streaming", "oracle", "random", "lazyllm"])
def test_method_without_an_index_reads_no_index_bytes(name):
    layer = create(name).prepare(random_context(), 0.1)[0]
    assert layer.index_bytes(random_call().query) == 0
