"""The decode kernels over encoded rows against the reference, which decodes them."""

from dataclasses import replace

import interpreter  # before any kernel
import poison
import pytest
import torch
from devices import gpu
from test_triton_decode import (
    DTYPES,
    KEEP_ALL,
    KEEP_NONE,
    PATHS,
    SIZES,
    TUNING,
    inputs,
    layer_of,
    rule_of,
    run,
    scaled,
)
from trees import random_layer

from squeezed.attention import Suffix, reference
from squeezed.attention.triton.decode import launch as decode
from squeezed.attention.triton.decode import operator
from squeezed.config import BEST, ClusteringConfig
from squeezed.context.captured import ObservedLayer
from squeezed.context.encoding import ENCODINGS, encoded, wide
from squeezed.indexing.calibrate import calibrate
from squeezed.indexing.clustering import cluster_layer
from squeezed.indexing.forest import Forest
from squeezed.testing.compared import assert_matches_reference
from squeezed.testing.keys import REAL_LIKE, draw

TURNED = 2**-14
"""Relative error of a turned query, which is written in 15 bits of its largest number; that is a
few times the typical one."""

encodings = pytest.mark.parametrize("encoding", ENCODINGS)


def longest_difference(layer):
    """The norm of the longest key, relative to its leaf's mean."""
    keys = wide(layer, torch.float64)[0][:, layer.pinned :]
    means = torch.stack(list(layer.of_leaves(layer.levels[-1].centroids)))
    return float((keys - means.double()).norm(dim=-1).max())


def assert_equals_reference(query, layer, rule, keys, values, mask=None, tuning=TUNING, valid=None):
    layer = scaled(layer, query)
    suffix = None if keys is None else Suffix(keys, values, mask)
    found = decode.decode_step(query, layer, rule, suffix, valid, tuning)
    reach = layer.scale * float(query.double().norm(dim=-1).max()) * longest_difference(layer)
    assert_matches_reference(found, query, layer, rule, suffix, valid, mass_floor=TURNED * reach)


@pytest.fixture(autouse=True)
def poisoned_buffers(request, monkeypatch):
    if "operator" not in request.node.name:  # PyTorch's tracing knows only its own functions
        poison.buffers(monkeypatch)


def written(layer, encoding):
    return encoded(layer, encoding).to(interpreter.DEVICE)


@SIZES
@pytest.mark.parametrize(
    ("levels", "far_field", "path"),
    [
        (1, "second_order", "one round"),
        (2, "none", "one round"),
        (2, "first_order", "several rounds"),
        (3, "second_order", "several rounds"),
    ],
)
def test_coded_rows_equal_reference_at_any_depth_and_far_field(levels, far_field, path, size):
    layer = layer_of(**size | {"nodes": size["nodes"][-levels:]})
    rule = rule_of(layer, 2, far_field=far_field, second_order=True)
    query, keys, values = inputs(layer, group=2)
    layer = written(layer, "int4")
    assert_equals_reference(query, layer, rule, keys, values, tuning=PATHS[path])


@SIZES
@encodings
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("group", "dim"), [(1, 64), (3, 96), (4, 128), (16, 32), (2, 256), (2, 80), (1, 16)]
)
def test_coded_rows_equal_reference_for_head_shapes(group, dim, dtype, encoding, size):
    layer = layer_of(dim=dim, dtype=dtype, **size | {"nodes": size["nodes"][-2:]})
    rule = rule_of(layer, group, far_field="first_order")
    query, keys, values = inputs(layer, group=group)
    assert_equals_reference(query, written(layer, encoding), rule, keys, values)


@encodings
@pytest.mark.parametrize(("batch", "group"), [(3, 2), (5, 1), gpu(40, 2), gpu(64, 1)])
def test_requests_that_share_coded_rows_equal_reference(batch, group, encoding):
    layer = layer_of()
    query, keys, values = inputs(layer, batch, group)
    mask = torch.rand(batch, 1, 1, keys.shape[2], device=query.device) > 0.4
    mask[0] = False  # a request of padding
    valid = mask.any(-1)[:, 0]
    for far_field, tuning in zip(("none", "second_order"), PATHS.values(), strict=True):
        rule = rule_of(layer, group, far_field=far_field)
        own = written(layer, encoding)
        assert_equals_reference(query, own, rule, keys, values, mask, tuning, valid)


def test_more_rows_than_a_tile_equal_reference_over_coded_rows(monkeypatch):
    monkeypatch.setattr("squeezed.attention.triton.decode.workspace.MAX_ROWS", 4)
    layer = layer_of(kv_heads=1, pinned=21)
    for far_field in ("first_order", "second_order"):
        rule = rule_of(layer, 2, far_field=far_field)
        query, keys, values = inputs(layer, batch=5, group=2, seed=3)
        assert_equals_reference(query, written(layer, "int4"), rule, keys, values)


@encodings
@pytest.mark.parametrize("threshold", [KEEP_ALL, KEEP_NONE])
@pytest.mark.parametrize("pinned", [0, 20])
def test_all_coded_rows_and_none_equal_reference(threshold, pinned, encoding):
    layer = layer_of(pinned=pinned)
    rule = rule_of(layer, threshold=threshold, far_field="first_order")
    query, keys, values = inputs(layer)
    own = written(layer, encoding)
    read = run(query, own, rule, keys, values).keys_read
    assert read.tolist() == [2 * layer.clustered * (threshold == KEEP_ALL)]
    assert_equals_reference(query, own, rule, keys, values)
    assert_equals_reference(query, own, rule, None, None) if pinned else None


@encodings
def test_clusters_of_one_or_two_keys_equal_reference_over_coded_rows(encoding):
    layer = layer_of(tokens=84, pinned=20, nodes=(8, 200))  # most are empty
    rule = rule_of(layer, threshold=KEEP_ALL)
    query, keys, values = inputs(layer)
    assert_equals_reference(query, written(layer, encoding), rule, keys, values)


@encodings
def test_differences_of_any_size_equal_reference(encoding):
    layer = layer_of()
    query, keys, values = inputs(layer)
    own = written(layer, encoding)
    for factor in (2.0**-20, 0.0, 2.0**20):  # of values alone: logits would leave all others behind
        scales = own.rows.codes.scales * torch.tensor([1.0, factor])
        scales = scales.to(torch.bfloat16).to(interpreter.DEVICE)
        scales[0, ::3] = own.rows.codes.scales[0, ::3]  # next to rows of the usual size
        codes = replace(own.rows.codes, scales=scales)
        changed = replace(own, rows=replace(own.rows, codes=codes))
        if factor > 1:
            query, values = query * 0.5, values * 0
        assert_equals_reference(query, changed, rule_of(layer), keys, values)


def test_a_number_that_is_none_shows():
    layer = layer_of()
    query, keys, values = inputs(layer)
    query[0, 1] = float("nan")
    found = run(query, written(layer, "int4"), rule_of(layer, threshold=KEEP_ALL), keys, values)
    assert found.output[0, 1].isnan().all() and found.output[0, 0].isfinite().all()


BUDGETS = (1.0, 0.3, 0.1, 0.02)
HALVES = (torch.bfloat16, torch.float16)


@encodings
@pytest.mark.parametrize(
    ("kind", "dtype", "tokens"),
    [
        *((kind, torch.float16, 240) for kind in ("common 100", "heavy tails", "large values")),
        *(gpu(kind, half, 20_000) for kind in REAL_LIKE for half in HALVES),
    ],
)  # fmt: skip
def test_coded_rows_with_real_statistics_equal_reference(kind, dtype, tokens, encoding):
    drawn = draw(REAL_LIKE[kind], tokens, 2, 32, dtype, group=2, seed=5, device=interpreter.DEVICE)
    config = ClusteringConfig(pinned_first=4, pinned_last=12)
    layer = cluster_layer(drawn.keys, drawn.values, config, drawn.probe, drawn.scale)
    rules = calibrate(Forest.of([ObservedLayer(layer, drawn.probe)]), BEST, BUDGETS[1:])
    layer = encoded(layer, encoding)
    suffix = Suffix.of(layer, drawn.suffix_keys, drawn.suffix_values)
    reach = layer.scale * float(drawn.query.double().norm(dim=-1).max())
    floor = TURNED * reach * longest_difference(layer)
    for budget in BUDGETS:
        rule = rules.rule(0, budget, False)
        found = decode.decode_step(drawn.query, layer, rule, suffix, None, TUNING)
        assert_matches_reference(found, drawn.query, layer, rule, suffix, None, None, floor)


@pytest.mark.gpu
def test_a_step_over_coded_rows_replays_from_a_graph():
    layer = layer_of().to("cuda")
    query, keys, values = inputs(layer, batch=2, group=2)
    rule = rule_of(layer, 2, far_field="first_order")
    layer = written(layer, "int4")
    eager, _, _ = run(query, layer, rule, keys, values)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _, _ = run(query, layer, rule, keys, values)
    for _ in range(3):
        captured.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(captured, eager, atol=2e-2, rtol=2e-2)


@encodings
def test_operator_reads_coded_rows(encoding):
    layer = random_layer(dtype=torch.float16, dim=32).to(interpreter.DEVICE)
    query, keys, values = inputs(layer)
    rule = rule_of(layer)
    own = scaled(written(layer, encoding), query)
    suffix = Suffix(keys, values)
    compiled = torch.compile(
        lambda query: operator.decode_step(2 * query, own, rule, suffix),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    output, _, read = compiled(query)
    expected = reference.attend(2 * query, own, rule, suffix)
    torch.testing.assert_close(output, expected.output, atol=2e-3, rtol=2e-3)
    assert read.tolist() == expected.keys_read.tolist()
