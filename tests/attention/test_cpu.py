"""The CPU implementation against the reference: same selection, same output, any layout."""

import math
import os
import subprocess
import sys
from dataclasses import replace

import poison
import pytest
import torch
from trees import far_alpha_for, random_layer

from squeezed.attention import Suffix, cpu, reference
from squeezed.attention.cpu import decode, gathered, walk
from squeezed.attention.scores import block_scores, grouped
from squeezed.attention.walk import scored_levels
from squeezed.config import ClusteringConfig
from squeezed.context.encoding import encoded
from squeezed.context.rule import SelectionRule
from squeezed.errors import SqueezedError
from squeezed.indexing.clustering import cluster_layer
from squeezed.testing.compared import assert_matches_reference
from squeezed.testing.keys import REAL_LIKE, draw

SCALE = 0.2
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    poison.buffers(monkeypatch, decode, walk)


def request(layer, batch=2, group=4, rows=1, suffix=5, seed=1, spread=1.0):
    """Random query `[B, Hq, Q, D]` and suffix `[B, Hkv, S, D]` in the layer's dtype."""
    generator = torch.Generator().manual_seed(seed)
    heads, dim = layer.kv_heads, layer.dim
    query = torch.randn(batch, heads * group, rows, dim, generator=generator) * spread
    keys, values = torch.randn(2, batch, heads, suffix, dim, generator=generator)
    return [t.to(layer.dtype) for t in (query, keys, values)]


def rule_for(layer, query, far_field="none", block=1, shares=(0.5, 0.3), second_order=True):
    """A rule whose thresholds lie in a wide gap between scores: rounding decides nothing."""
    heads = query.shape[1]
    alpha = torch.linspace(0.2, 1.4, len(layer.levels) * heads).view(-1, heads)
    everything = (-math.inf,) * len(layer.levels)
    alpha = alpha if second_order else None
    far_alpha = far_alpha_for(layer, far_field, heads // layer.kv_heads)
    rule = SelectionRule.for_all_heads(everything, layer, alpha, far_field, block, far_alpha)
    for depth, share in enumerate(shares[-len(layer.levels) :]):
        if share == 1:
            continue
        for head, scores in enumerate(_scores(layer, query, rule, depth)):
            at = int(len(scores) * (1 - share))
            near = scores[max(0, at - 5) : at + 6]
            widest = int(near.diff().argmax())
            rule.log_thresholds[depth, head] = float(near[widest] + near[widest + 1]) / 2
    return rule


def _scores(layer, query, rule, depth):
    """Block scores of every head's filled nodes of one level, ascending."""
    q = grouped(query.double(), layer.kv_heads)
    level = list(scored_levels(q, replace(layer, scale=SCALE), rule.alpha))[depth]
    scores = block_scores(level.log_scores, rule.query_block, None)
    each = (head.flatten() for head in scores.unbind(1))
    return [head[head.isfinite()].sort().values for head in each]


def assert_close(got, query, layer, rule, keys, values, mask=None, floor=None):
    valid = None if mask is None else mask.any(-1)[:, 0]
    suffix = Suffix(keys, values, mask)
    assert_matches_reference(got, query, layer, rule, suffix, valid, floor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("far_field", ["none", "first_order", "second_order"])
@pytest.mark.parametrize(("rows", "block", "group"), [(1, 1, 4), (5, 2, 7), (70, 32, 2), (3, 1, 1)])
def test_cpu_matches_reference(dtype, far_field, rows, block, group):
    layer = random_layer(dtype=dtype, tokens=400, nodes=(8, 40))
    query, keys, values = request(layer, group=group, rows=rows, suffix=rows + 4)
    rule = rule_for(layer, query, far_field, block)
    assert_close(
        cpu.attend(query, layer, rule, Suffix(keys, values)), query, layer, rule, keys, values
    )


@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.1, 0.03])
@pytest.mark.parametrize(
    ("dim", "rows", "group"), [(32, 1, 4), (80, 2, 3), (128, 1, 7), (64, 9, 5)]
)
def test_cpu_reads_encoded_rows(name, share, dim, rows, group):
    layer = random_layer(dtype=torch.bfloat16, tokens=500, nodes=(8, 40), dim=dim)
    query, keys, values = request(layer, group=group, rows=rows, suffix=rows + 3)
    shares = (1.0, 1.0) if share == 1 else (share**0.5, share)
    rule = rule_for(layer, query, "second_order", 2, shares)
    written = encoded(layer, name)
    got = cpu.attend(query, written, rule, Suffix(keys, values))
    assert_close(got, query, written, rule, keys, values)


@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize("share", [1.0, 0.1])
def test_cpu_reads_encoded_rows_in_products_a_piece_at_a_time(name, share, monkeypatch):
    monkeypatch.setattr(gathered, "PIECE_ROWS", 64)
    layer = random_layer(dtype=torch.bfloat16, tokens=500, nodes=(8, 40), dim=80)
    query, keys, values = request(layer, group=2, rows=70, suffix=74)
    shares = (1.0, 1.0) if share == 1 else (share**0.5, share)
    rule = rule_for(layer, query, "second_order", 32, shares)
    written = encoded(layer, name)
    got = cpu.attend(query, written, rule, Suffix(keys, values))
    assert_close(got, query, written, rule, keys, values)


@pytest.mark.parametrize("kind", ["common 1000", "heavy tails", "near-duplicates", "large values"])
def test_cpu_reads_encoded_rows_of_any_statistics(kind):
    drawn = draw(REAL_LIKE[kind], 700, 2, 64, torch.bfloat16, group=3, rows=2)
    config = ClusteringConfig(pinned_first=4, pinned_last=16)
    layer = encoded(cluster_layer(drawn.keys, drawn.values, config, drawn.probe), "int4")
    rule = rule_for(layer, drawn.query, "first_order", shares=(0.6, 0.4))
    suffix = Suffix.of(layer, drawn.suffix_keys, drawn.suffix_values)
    got = cpu.attend(drawn.query, layer, rule, suffix)
    assert_matches_reference(got, drawn.query, layer, rule, suffix)


@pytest.mark.parametrize("nodes", [(30,), (4, 12, 50), (5, 9, 20, 60)])
def test_cpu_matches_reference_at_any_depth(nodes):
    layer = random_layer(tokens=400, nodes=nodes)
    query, keys, values = request(layer)
    rule = rule_for(layer, query, "first_order", shares=(0.7, 0.6, 0.5, 0.4), second_order=False)
    assert_close(
        cpu.attend(query, layer, rule, Suffix(keys, values)), query, layer, rule, keys, values
    )


@pytest.mark.parametrize("dim", [16, 40, 67])
def test_cpu_takes_any_head_dimension(dim):
    layer = random_layer(dim=dim)
    query, keys, values = request(layer, group=3)
    rule = rule_for(layer, query, "second_order")
    assert_close(
        cpu.attend(query, layer, rule, Suffix(keys, values)), query, layer, rule, keys, values
    )


def test_cpu_cuts_large_leaves_and_many_rows_into_tasks():
    layer = random_layer(tokens=3000, nodes=(2, 3), pinned=600)
    query, keys, values = request(layer, batch=40, suffix=700)
    rule = rule_for(layer, query, "first_order", shares=(1.0, 0.5))
    assert_close(
        cpu.attend(query, layer, rule, Suffix(keys, values)), query, layer, rule, keys, values
    )


@pytest.mark.parametrize("rows", [1, 70])
def test_cpu_everything_kept_equals_dense(rows):
    layer = random_layer()
    query, keys, values = request(layer, rows=rows, suffix=rows)
    rule = SelectionRule.for_all_heads((-math.inf, -math.inf), layer, None, "first_order", 16)
    output, _, keys_read = cpu.attend(query, layer, rule, Suffix(keys, values))
    assert keys_read.tolist() == [layer.keys.shape[0] * layer.clustered * rows] * 2
    batch = query.shape[0]
    context = [t.double().expand(batch, -1, -1, -1) for t in (layer.keys, layer.values)]
    all_keys, all_values = torch.cat([context[0], keys], 2), torch.cat([context[1], values], 2)
    mask = torch.ones(rows, all_keys.shape[2], dtype=torch.bool).tril(layer.tokens)
    dense = torch.nn.functional.scaled_dot_product_attention(
        query.double(), all_keys.double(), all_values.double(), mask, scale=SCALE, enable_gqa=True
    )
    torch.testing.assert_close(output.double(), dense, rtol=2e-5, atol=1e-6)


def test_cpu_small_budget_differs_from_dense():
    layer = random_layer()
    query, keys, values = request(layer)
    dense = SelectionRule.for_all_heads((-math.inf, -math.inf), layer, None, "none")
    few = rule_for(layer, query, shares=(0.3, 0.05))
    outputs = [cpu.attend(query, layer, r, Suffix(keys, values))[0] for r in (dense, few)]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2


@pytest.mark.parametrize("rows", [1, 70])
def test_cpu_neighbours_in_a_batch_do_not_matter(rows):
    layer = random_layer()
    query, keys, values = request(layer, batch=3, rows=rows, suffix=rows)
    rule = rule_for(layer, query, "second_order", block=32)
    together, _, read = cpu.attend(query, layer, rule, Suffix(keys, values))
    for b in range(3):
        own = slice(b, b + 1)
        alone, _, alone_read = cpu.attend(query[own], layer, rule, Suffix(keys[own], values[own]))
        torch.testing.assert_close(together[own], alone, rtol=1e-5, atol=1e-6)
        assert read[b] == alone_read[0]


@pytest.mark.parametrize("rows", [3, 70])
def test_cpu_masks_left_padding(rows):
    layer = random_layer()
    query, keys, values = request(layer, rows=rows, suffix=rows + 2)
    mask = torch.ones(rows, rows + 2, dtype=torch.bool).tril(2).expand(2, 1, -1, -1).clone()
    mask[0, :, :, : rows + 1] = False  # one real token left in the first request
    rule = rule_for(layer, query, "first_order", block=32)
    got = cpu.attend(query, layer, rule, Suffix(keys, values, mask), mask.any(-1)[:, 0])
    assert_close(got, query, layer, rule, keys, values, mask)


@pytest.mark.parametrize("rows", [1, 70])
def test_cpu_every_head_selects_by_its_own_thresholds(rows):
    layer = random_layer()
    query, keys, values = request(layer, rows=rows, suffix=rows)
    rule = SelectionRule.for_all_heads((-math.inf, -math.inf), layer, None, "first_order", 16)
    rule.log_thresholds[:, 1:] = math.inf
    got = cpu.attend(query, layer, rule, Suffix(keys, values))
    assert got.keys_read.tolist() == [layer.clustered * rows] * 2
    assert_close(got, query, layer, rule, keys, values)


def test_cpu_rows_that_attend_to_nothing_are_zero():
    layer = random_layer(pinned=0)
    query, keys, values = request(layer)
    mask = torch.zeros(2, 1, 1, 5, dtype=torch.bool)
    rule = SelectionRule.for_all_heads((-math.inf, -math.inf), layer, None, "none")
    padding = torch.zeros(2, 1, dtype=torch.bool)
    output, log_mass, read = cpu.attend(query, layer, rule, Suffix(keys, values, mask), padding)
    assert output.abs().max() == 0 and read.tolist() == [0, 0]
    assert (log_mass == -math.inf).all()


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("suffix", [0, 40])
def test_cpu_reads_all_rows_of_a_layer_without_levels(rows, suffix):
    layer = random_layer(tokens=700)
    layer = replace(layer, levels=())
    query, keys, values = request(layer, rows=rows, suffix=suffix)
    rule = SelectionRule.for_all_heads((), layer, None, "first_order")
    assert_close(
        cpu.attend(query, layer, rule, Suffix(keys, values)), query, layer, rule, keys, values
    )


@pytest.mark.parametrize("rows", [1, 40])
def test_cpu_reads_expanded_and_sliced_suffixes_in_place(rows):
    layer = random_layer()
    query, keys, values = request(layer, rows=rows, suffix=2 * rows + 9)
    keys, values = keys[:1, :, 3 : rows + 8].expand(2, -1, -1, -1), values[:, :, 2 : rows + 7]
    values = values.transpose(2, 3).contiguous().transpose(2, 3)
    rule = rule_for(layer, query, "first_order", block=20)
    assert_close(
        cpu.attend(query, layer, rule, Suffix(keys, values)), query, layer, rule, keys, values
    )


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize(("offset", "spread"), [(-1e4, 1.0), (0.0, 1e3)])
def test_cpu_survives_extreme_logits(offset, spread, rows):
    """All logits far below zero, and logits of about ±1e4."""
    keys = torch.randn(2, 300, 32, generator=torch.Generator().manual_seed(5))
    keys[..., 0] = offset / SCALE
    layer = random_layer(keys=keys)
    query, suffix_keys, suffix_values = request(layer, rows=rows, suffix=rows, spread=spread)
    query[..., 0] = 1.0
    suffix_keys[..., 0] = offset / SCALE
    rule = rule_for(layer, query, "second_order", block=16, second_order=False)
    got = cpu.attend(query, layer, rule, Suffix(suffix_keys, suffix_values))
    assert got.output.isfinite().all() and got.log_mass.isfinite().all()
    rounding = 1e4 * torch.finfo(torch.float32).eps  # of one logit, in nats
    assert_close(got, query, layer, rule, suffix_keys, suffix_values, floor=rounding)


def test_cpu_honours_the_threads_of_torch():
    layer = random_layer()
    query, keys, values = request(layer)
    rule = rule_for(layer, query, "first_order")
    before = torch.get_num_threads()
    outputs = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outputs.append(cpu.attend(query, layer, rule, Suffix(keys, values))[0])
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", ["query", "suffix key", "suffix value", "key", "value", "pinned"])
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("far_field", ["none", "second_order"])
def test_nan_shows_where_dense_attention_shows_it(place, rows, far_field):
    """Budget 1.0; 16 rows of 4 heads are worked on by matrix products, one row is not."""
    layer = random_layer()
    query, keys, values = request(layer, rows=rows, suffix=rows + 2)
    where = {
        "query": query[0, 1, -1], "suffix key": keys[1, 0, 1], "suffix value": values[0, 1, 0],
        "key": layer.keys[1, -1], "value": layer.values[0, 40], "pinned": layer.keys[0, 3],
    }  # fmt: skip
    where[place][7] = math.nan
    far_alpha = far_alpha_for(layer, far_field, 4)
    all_kept = (-math.inf, -math.inf)
    rule = SelectionRule.for_all_heads(all_kept, layer, None, far_field, far_alpha=far_alpha)
    full_keys, full_values = (
        torch.cat([context.expand(2, -1, -1, -1), own], 2).repeat_interleave(4, 1)
        for context, own in ((layer.keys, keys), (layer.values, values))
    )
    logits = SCALE * query @ full_keys.mT
    later = ~torch.ones(rows, rows + 2, dtype=torch.bool).tril(2)
    logits[..., layer.tokens :].masked_fill_(later, -math.inf)
    expected = (logits.softmax(-1) @ full_values).isnan()
    assert expected.any() and not expected.all()
    for implementation in (cpu, reference):
        output = implementation.attend(query, layer, rule, Suffix(keys, values)).output
        assert output.isnan().equal(expected), implementation.__name__


@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("far_field", ["none", "first_order"])
def test_query_of_nan_hides_nothing_from_its_block(rows, far_field):
    """At a small budget too: its own row is NaN, and the rows that select with it read exactly."""
    layer = random_layer(tokens=400, nodes=(8, 40))
    query, keys, values = request(layer, rows=rows, suffix=rows)
    rule = rule_for(layer, query, far_field, block=32)
    query[0, 2, -1] = math.nan
    output, _, read = cpu.attend(query, layer, rule, Suffix(keys, values))
    expected, _, expected_read = reference.attend(query, layer, rule, Suffix(keys, values))
    assert output[0, 2, -1].isnan().all() and output.isnan().equal(expected.isnan())
    assert read.tolist() == expected_read.tolist()
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_rows_of_padding_without_anything_to_read_are_zero():
    layer = random_layer(pinned=0)
    query, keys, values = request(layer, rows=3, suffix=3)
    everything_dropped = SelectionRule.for_all_heads((math.inf, math.inf), layer, None, "none")
    mask = torch.ones(2, 1, 3, 3, dtype=torch.bool).tril()
    mask[0, :, 0] = False
    for implementation in (cpu, reference):
        output, log_mass, _ = implementation.attend(
            query, layer, everything_dropped, Suffix(keys, values, mask)
        )
        assert (output[0, :, 0] == 0).all() and output.isfinite().all()
        assert (log_mass[0, :, 0] == -math.inf).all() and log_mass[1].isfinite().all()


def test_cpu_refuses_double_precision_keys():
    layer = random_layer(dtype=torch.float64)
    query, keys, values = request(layer)
    with pytest.raises(SqueezedError, match="expected float32, bfloat16 or float16"):
        cpu.attend(query, layer, rule_for(layer, query), Suffix(keys, values))


def test_cpu_of_no_queries_is_empty():
    layer = random_layer()
    query, keys, values = request(layer, rows=0)
    rule = SelectionRule.for_all_heads((-math.inf, -math.inf), layer, None, "none")
    output, _, keys_read = cpu.attend(query, layer, rule, Suffix(keys, values))
    assert output.shape == query.shape and keys_read.tolist() == [0, 0]


def test_cpu_leaves_the_threads_of_torch_alone():
    """In a process of its own: starting Numba's pool resets OpenMP's number of threads."""
    program = """
import torch
from trees import random_layer
from squeezed.attention import Suffix, cpu
from squeezed.context.rule import SelectionRule
torch.set_num_threads(1)
layer = random_layer()
query, suffix = torch.randn(1, 4, 1, 32), torch.randn(1, 2, 3, 32)
rule = SelectionRule.for_all_heads((-9.0, -9.0), layer, None, "none")
cpu.attend(query, layer, rule, Suffix(suffix, suffix))
assert torch.get_num_threads() == 1, torch.get_num_threads()
"""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
