"""Plan, inspection, answers, meters and benches count the same bytes of one context."""

import pytest
import torch
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.answers.reading import answer_queries, traffic
from squeezed.attention.interface import Suffix
from squeezed.attention.reference.lookup import lookup
from squeezed.config import BEST, PAPER, ClusteringConfig, IndexConfig
from squeezed.context.bytes import LayerBytes
from squeezed.costs.inspection import describe
from squeezed.costs.plan import plan
from squeezed.costs.shape import model_shape
from squeezed.hf.answer import respond
from squeezed.measure.accuracy.meter import Meter
from squeezed.measure.speed.decode import physical_bytes
from squeezed.methods import create
from squeezed.methods.traffic import step_bytes

BUDGET = 0.2


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def context(model):
    clustering = ClusteringConfig(levels=(0.05, 0.2), pinned_last=20)
    return squeezed.index(model, tiny_tokenizer(), document(900), IndexConfig(clustering))


def planned(model, context, preset, budget=BUDGET):
    shape = model_shape(model.config, element_bytes=4)
    return plan(shape, len(context.tokens), budget, 1e12, context.config.clustering, preset)


def test_what_a_context_holds_is_what_plan_and_inspection_say(model, context):
    found, shown = planned(model, context, BEST), describe(context)
    layer = context.clustered_layers[0]
    nodes = [level.nodes for level in layer.levels]
    heads = layer.keys.shape[0]
    assert found.kv_bytes == shown["kv_bytes"] == context.kv_bytes()
    assert found.index_bytes == shown["index_bytes"] == context.index_bytes()
    assert LayerBytes.of(layer).index(layer.tokens, nodes) * heads == layer.index_bytes()
    assert LayerBytes.of(layer).keys(layer.tokens) * heads == layer.kv_bytes()


@pytest.mark.parametrize("preset", ["paper", "best"])
def test_an_answers_bytes_are_those_of_the_meter_and_of_the_benches(model, context, preset):
    cache = context.cache(BUDGET, preset=preset, implementation="reference")
    cache.watch_queries()
    ids = context.template.question_ids(tiny_tokenizer(), "mu?")[-1:]  # one token in, one out
    respond(model, tiny_tokenizer(), cache, ids, max_new_tokens=1)
    counted = traffic(context, cache)

    meter, stepped = Meter(), 0
    for entry in meter.metering(cache).context_layers:
        query, own = answer_queries(entry), entry.context
        assert query.shape[2] == 1
        nothing = query.new_zeros(1, own.layer.keys.shape[0], 1, query.shape[3])
        call = query, Suffix(nothing, nothing), None, True
        entry.listen(*call, own.attend(*call))
        found = lookup(query, own.layer, own.rule)
        stepped += step_bytes(own.layer, found, own.rule)
    assert counted.total == pytest.approx(float(meter.bytes_read), rel=1e-9)
    assert counted.total == stepped
    assert counted.dense == meter.bytes == context.kv_bytes()


def test_requests_that_want_the_same_are_counted_once_in_a_step_and_each_by_itself_elsewhere(
    context,
):
    layer = create("best", implementation="reference").prepare(context, BUDGET)[1]
    heads, dim = layer.layer.keys.shape[0], layer.layer.keys.shape[2]
    query = torch.randn(1, 4, 1, dim, generator=torch.Generator().manual_seed(1))
    one, many = query, query.repeat(3, 1, 1, 1)
    alone, together = (
        step_bytes(layer.layer, lookup(q, layer.layer, layer.rule), layer.rule) for q in (one, many)
    )
    assert alone == together
    assert float(layer.index_bytes(many)) == 3 * float(layer.index_bytes(one))
    kept = lookup(one, layer.layer, layer.rule).kept[0, :, 0]
    exact = heads * layer.layer.pinned + int((kept * layer.layer.levels[-1].sizes).sum())
    assert alone == 2 * 4 * dim * exact + float(layer.index_bytes(one))
    lean = physical_bytes(one, layer.layer, layer.rule)
    assert 2 * 4 * dim * exact < lean < alone  # a far field reads mean values besides


@pytest.mark.parametrize("preset", [PAPER, BEST], ids=lambda preset: preset.name)
def test_a_plan_is_near_what_the_calibrating_queries_read(model, context, preset):
    method = create("squeezed", preset=preset.name, implementation="reference")
    read = 0.0
    for layer, queries in zip(method.prepare(context, BUDGET), context.observed, strict=True):
        query, tree = queries[None], layer.layer
        kept = lookup(query, tree, layer.rule).kept
        keys = float((kept * tree.levels[-1].sizes[:, None]).sum()) / query.shape[2]
        keys += tree.pinned * tree.keys.shape[0]
        read += 2 * 4 * 16 * keys + float(layer.index_bytes(query)) / query.shape[2]
    assert read == pytest.approx(planned(model, context, preset).squeezed_bytes_per_token, rel=0.1)
