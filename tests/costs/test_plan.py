"""The plan's arithmetic against contexts that were really made."""

import pytest
import torch
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.config import BEST, PAPER, ClusteringConfig, IndexConfig, Preset
from squeezed.costs.plan import plan
from squeezed.costs.shape import ModelShape, model_shape
from squeezed.errors import SqueezedError, UnsupportedModelError
from squeezed.indexing.clustering import cluster_layer

BANDWIDTH = 1e12


def planned(model, tokens, budget=0.1, clustering=None, preset=BEST):
    shape = model_shape(model.config, element_bytes=4)
    return plan(shape, tokens, budget, BANDWIDTH, clustering or ClusteringConfig(), preset)


@pytest.mark.parametrize("family", ["llama", "smollm", "qwen3", "gemma3"])
@pytest.mark.parametrize("levels", [(0.01, 0.05), (0.05,), (0.01, 0.05, 0.2)])
def test_plan_bytes_are_those_of_a_real_context(family, levels):
    model, clustering = tiny_model(family), ClusteringConfig(levels=levels)
    config = IndexConfig(clustering=clustering)
    context = squeezed.index(model, tiny_tokenizer(), document(700), config)
    found = planned(model, len(context.tokens), clustering=clustering)
    slots = sum(1 for window in context.windows if window)
    expected = context.kv_bytes()
    if slots:  # a window keeps one token less: the next one completes it
        assert expected <= found.kv_bytes <= expected * 1.05
    else:
        assert found.kv_bytes == expected
    assert found.index_bytes == context.index_bytes()


def test_plan_of_a_short_document_has_no_levels():
    assert ClusteringConfig().counts(100) == ()
    found = planned(tiny_model("llama"), 100)
    assert found.squeezed_bytes_per_token == found.dense_bytes_per_token
    assert found.clustering_flops == 0


@pytest.mark.parametrize("levels", [(0.01, 0.05), (0.3, 0.7), (1.0,)])
def test_index_and_plan_count_the_same_nodes_at_every_length(levels):
    config = ClusteringConfig(levels=levels, iterations=1, pinned_first=3, pinned_last=5)
    for tokens in (*range(1, 60), 118, 130, 145, 146):
        keys = torch.randn(1, tokens, 8)
        layer = cluster_layer(keys, keys, config)
        assert tuple(level.nodes for level in layer.levels) == config.counts(tokens), tokens
        assert layer.pinned == (config.pinned(tokens)[1] if layer.levels else tokens)


def test_plan_counts_the_models_weights():
    model = tiny_model("llama")
    assert planned(model, 1000).shape.parameters == sum(x.numel() for x in model.parameters())


def test_plan_reads_less_at_a_smaller_budget_and_all_when_dense():
    model = tiny_model("llama")
    read = [planned(model, 50_000, b).squeezed_bytes_per_token for b in (0.025, 0.1, 0.5, 1.0)]
    assert read == sorted(read) and read[-1] == planned(model, 50_000).dense_bytes_per_token
    assert planned(model, 50_000, 1.0).attention_speedup == 1.0


def test_plan_nested_lookup_reads_fewer_centroids_than_the_papers():
    model = tiny_model("llama")
    without_far_field = Preset("lean", second_order=False, far_field="none", coarse_share=1.25)
    lean = planned(model, 100_000, 0.05, preset=without_far_field)
    best = planned(model, 100_000, 0.05, preset=BEST)
    paper = planned(model, 100_000, 0.05, preset=PAPER)
    assert lean.squeezed_bytes_per_token < paper.squeezed_bytes_per_token
    assert best.clustering_flops == paper.clustering_flops > 0


def test_plan_bytes_of_a_small_case_are_those_worked_out_by_hand():
    shape = ModelShape(1, 0, 0, heads=2, kv_heads=1, head_dim=8, element_bytes=2, parameters=10)
    clustering = ClusteringConfig(levels=(0.01, 0.1), pinned_first=50, pinned_last=50)
    preset = Preset("p", second_order=False, far_field="first_order", coarse_share=1.0)
    found = plan(shape, 1100, 0.25, 1e12, clustering, preset)
    keys = 2 * 16 * (100 + 250)  # pinned, and a quarter of the 1,000 others
    coarse = 10 * (16 + 4) + 5 * 16  # ten scored, half of them dropped
    fine = 50 * (16 + 4) + 25 * 16  # children of the kept half; a quarter of all is dropped there
    assert found.squeezed_bytes_per_token == keys + coarse + fine
    assert found.weight_bytes == 20 and found.kv_bytes == 2 * 16 * 1100


def test_plan_times_follow_the_bandwidth():
    model = tiny_model("llama")
    shape = model_shape(model.config)
    slow, fast = (
        plan(shape, 10_000, 0.1, bandwidth, ClusteringConfig(), BEST) for bandwidth in (1e11, 2e11)
    )
    assert slow.dense_ms == pytest.approx(2 * fast.dense_ms)
    assert slow.token_speedup == fast.token_speedup > 1


@pytest.mark.parametrize(
    ("tokens", "budget", "bandwidth"), [(0, 0.1, 1e12), (1000, 0.0, 1e12), (1000, 0.1, 0.0)]
)
def test_plan_refuses_senseless_numbers(tokens, budget, bandwidth):
    shape = model_shape(tiny_model("llama").config)
    with pytest.raises(SqueezedError):
        plan(shape, tokens, budget, bandwidth, ClusteringConfig(), BEST)


def test_plan_refuses_models_that_cannot_be_squeezed():
    import transformers

    with pytest.raises(SqueezedError, match="causal"):
        model_shape(transformers.CLIPConfig())
    with pytest.raises(UnsupportedModelError):
        model_shape(transformers.MistralConfig(num_hidden_layers=1, sliding_window=64))
