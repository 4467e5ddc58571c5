"""A NaN or infinity in what a model computed is refused, with its layer and token."""

import copy
import math

import pytest
import torch
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed import ClusteringConfig, SqueezedError
from squeezed.context.captured import CapturedLayer
from squeezed.indexing.clustering import cluster_layer
from squeezed.indexing.finite import check_captured, is_finite

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_is_finite_sees_one_bad_element(dtype, bad):
    rows = torch.randn(2, 50, 8).to(dtype)
    rows[0, 0, 0] = torch.finfo(dtype).max
    rows[1, 0, 0] = torch.finfo(dtype).min
    assert is_finite(rows)
    rows[1, 33, 5] = bad
    assert not is_finite(rows) and not is_finite(rows[:, 20:40])
    assert is_finite(rows[:, 34:]) and is_finite(rows[:, :0])


@pytest.mark.parametrize("name", ["keys", "values", "queries"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [3, 150])
def test_layer_with_a_bad_number_is_not_clustered(name, bad, at):
    keys, values, queries = (torch.randn(heads, 300, 8) for heads in (2, 2, 4))
    {"keys": keys, "values": values, "queries": queries}[name][1, at, 2] = bad
    kind = "NaN" if math.isnan(bad) else "an infinity"
    with pytest.raises(SqueezedError, match=f"{name}: .* {kind} at token {at}"):
        cluster_layer(keys, values, ClusteringConfig(), queries)


def test_first_bad_layer_is_named_and_windows_count_from_the_document():
    def layer(width, queries):
        return CapturedLayer(*torch.randn(2, 2, width, 8), queries, 0.3)

    captured = [layer(32, None), layer(100, torch.randn(4, 9, 8)), layer(100, torch.randn(4, 9, 8))]
    check_captured(captured, 100)
    captured[2].queries[3, 4, 0] = math.inf
    with pytest.raises(SqueezedError, match="queries of layer 2 hold an infinity at token 4"):
        check_captured(captured, 100)
    captured[0].values[1, 30, 0] = math.nan
    with pytest.raises(SqueezedError, match="values of layer 0 hold NaN at token 98 of the d"):
        check_captured(captured, 100)


@pytest.mark.parametrize("factor", [1e10, 1e18])
@pytest.mark.parametrize("name", ["keys", "queries"])
def test_numbers_whose_squares_pass_float32_are_refused(name, factor):
    heads = {"keys": 2, "values": 2, "queries": 4}
    tensors = {each: torch.randn(count, 300, 8) for each, count in heads.items()}
    tensors[name] *= factor
    keys, values, queries = tensors.values()
    with pytest.raises(SqueezedError, match=f"{name}: .*too large to square, at token 0"):
        cluster_layer(keys, values, ClusteringConfig(), queries)
    captured = [CapturedLayer(keys, values, queries, 0.3)]
    with pytest.raises(SqueezedError, match=f"{name} of layer 0 hold .*too large to square"):
        check_captured(captured, 300)


@pytest.mark.parametrize("scale", [1e4, 1e7])
def test_large_numbers_below_that_are_indexed(scale):
    model = copy.deepcopy(tiny_model())
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.mul_(scale)
    context = squeezed.index(model, tiny_tokenizer(), document(400))
    for layer, calibrated in zip(context.layers, context.calibrations["best"].alpha, strict=True):
        assert calibrated.isfinite().all() and layer.value_slope.isfinite().all()
        assert all(level.variance.isfinite().all() for level in layer.levels)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_index_refuses_a_model_that_overflows(family):
    model = copy.deepcopy(tiny_model(family))
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3] = math.inf
    with pytest.raises(SqueezedError, match="values of layer 1 hold") as refusal:
        squeezed.index(model, tiny_tokenizer(), document(400))
    assert "\n" not in str(refusal.value)
