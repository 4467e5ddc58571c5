"""Plan, inspection, answers, meters and benches count the same bytes of one context."""

import pytest
import torch
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.answers.reading import answer_queries, traffic
from squeezed.attention.interface import Suffix
from squeezed.attention.reference.lookup import lookup
from squeezed.config import BEST, PAPER, ROWS, ClusteringConfig, IndexConfig
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
def indexed(model):
    clustering = ClusteringConfig(levels=(0.05, 0.2), pinned_last=20)
    return squeezed.index(model, tiny_tokenizer(), document(900), IndexConfig(clustering))


@pytest.fixture(scope="module", params=ROWS)
def context(indexed, request):
    return indexed.encoded(request.param)


def planned(model, context, preset, budget=BUDGET):
    shape, clustering = model_shape(model.config, element_bytes=4), context.config.clustering
    return plan(shape, len(context.tokens), budget, 1e12, clustering, preset, context.rows)


def test_what_a_context_holds_is_what_plan_and_inspection_say(model, context):
    found, shown = planned(model, context, BEST), describe(context)
    layer = context.clustered_layers[0]
    nodes = [level.nodes for level in layer.levels]
    heads = layer.kv_heads
    assert found.kv_bytes == shown["kv_bytes"] == context.kv_bytes()
    assert found.index_bytes == shown["index_bytes"] == context.index_bytes()
    assert LayerBytes.of(layer).index(layer.tokens, nodes) * heads == layer.index_bytes()
    parts = LayerBytes.of(layer)
    each = parts.pinned(layer.pinned) + parts.keys(layer.clustered)
    assert each * heads == layer.kv_bytes()
    assert parts == LayerBytes.written(16, 4, context.rows) or context.rows == "plain"


def test_bits_are_what_is_left_of_keys_and_values(indexed):
    share = {rows: indexed.encoded(rows).kv_bytes() / indexed.kv_bytes() for rows in ROWS}
    pinned = 36 / len(indexed.tokens)
    for rows, width in (("int8", 16 + 2), ("int4", 8 + 2)):
        assert share[rows] == pytest.approx(pinned + (1 - pinned) * width / 64, rel=1e-9)


@pytest.mark.parametrize("preset", ["paper", "best"])
def test_an_answers_bytes_are_those_of_the_meter_and_of_the_benches(
    model, indexed, context, preset
):
    cache = context.cache(BUDGET, preset=preset, implementation="reference")
    cache.watch_queries()
    ids = context.template.question_ids(tiny_tokenizer(), "mu?")[-1:]  # one token in, one out
    respond(model, tiny_tokenizer(), cache, ids, max_new_tokens=1)
    counted = traffic(context, cache)

    meter, stepped = Meter(), 0
    for entry in meter.metering(cache).context_layers:
        query, own = answer_queries(entry), entry.context
        assert query.shape[2] == 1
        nothing = query.new_zeros(1, own.layer.kv_heads, 1, query.shape[3])
        call = query, Suffix(nothing, nothing), None, True
        entry.listen(*call, own.attend(*call))
        found = lookup(query, own.layer, own.rule)
        stepped += step_bytes(own.layer, found, own.rule)
    assert counted.total == pytest.approx(float(meter.bytes_read), rel=1e-9)
    assert counted.total == stepped
    assert counted.dense == context.kv_bytes()
    assert meter.bytes == indexed.kv_bytes()  # dense attention to plain rows, the same for all


def test_requests_that_want_the_same_are_counted_once_in_a_step_and_each_by_itself_elsewhere(
    context,
):
    layer = create("best", implementation="reference").prepare(context, BUDGET)[1]
    heads, dim = layer.layer.kv_heads, layer.layer.dim
    query = torch.randn(1, 4, 1, dim, generator=torch.Generator().manual_seed(1))
    one, many = query, query.repeat(3, 1, 1, 1)
    alone, together = (
        step_bytes(layer.layer, lookup(q, layer.layer, layer.rule), layer.rule) for q in (one, many)
    )
    assert alone == together
    assert float(layer.index_bytes(many)) == 3 * float(layer.index_bytes(one))
    kept = lookup(one, layer.layer, layer.rule).kept[0, :, 0]
    clustered = int((kept * layer.layer.levels[-1].sizes).sum())
    exact = 2 * 4 * dim * heads * layer.layer.pinned
    exact += layer.layer.rows.bytes_per_row * clustered
    assert alone == exact + float(layer.index_bytes(one))
    lean = physical_bytes(one, layer.layer, layer.rule)
    assert exact < lean < alone  # a far field reads mean values besides


@pytest.mark.parametrize("preset", [PAPER, BEST], ids=lambda preset: preset.name)
def test_a_plan_is_near_what_the_calibrating_queries_read(model, context, preset):
    method = create("squeezed", preset=preset.name, implementation="reference")
    read = 0.0
    for layer, queries in zip(method.prepare(context, BUDGET), context.observed, strict=True):
        query, tree = queries[None], layer.layer
        kept = lookup(query, tree, layer.rule).kept
        keys = float((kept * tree.levels[-1].sizes[:, None]).sum()) / query.shape[2]
        read += 2 * 4 * 16 * tree.pinned * tree.kv_heads + tree.rows.bytes_per_row * keys
        read += float(layer.index_bytes(query)) / query.shape[2]
    assert read == pytest.approx(planned(model, context, preset).squeezed_bytes_per_token, rel=0.1)
