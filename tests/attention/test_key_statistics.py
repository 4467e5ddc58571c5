"""Every implementation on keys as real models have them, against float64 on the model's own keys.

The oracle knows nothing of a layer's centre: it takes the keys as the model gave them, in float64,
with mean keys of its own. So what a large common part costs, in storage or in arithmetic, shows.
"""

from dataclasses import replace
from functools import cache

import interpreter  # before any kernel
import pytest
import torch

from squeezed.attention import Suffix, cpu, reference, triton
from squeezed.attention.reference.lookup import lookup
from squeezed.attention.scores import query_blocks
from squeezed.config import BEST, ClusteringConfig
from squeezed.context.captured import ObservedLayer
from squeezed.context.layers import ClusteredLayer
from squeezed.context.rows import Rows
from squeezed.indexing.calibrate import calibrate
from squeezed.indexing.clustering import cluster_layer
from squeezed.indexing.forest import Forest
from squeezed.testing.keys import REAL_LIKE, draw

BUDGETS = (1.0, 0.3, 0.1, 0.02)
CLUSTERING = ClusteringConfig(pinned_first=4, pinned_last=12)
HALVES = (torch.bfloat16, torch.float16)
TOKENS = 400


@cache
def case(kind, dtype, rows=1, device="cpu", tokens=TOKENS):
    """A drawn layer, clustered and calibrated, and its twin in float64 without a centre."""
    drawn = draw(REAL_LIKE[kind], tokens, 2, 32, dtype, group=2, rows=rows, seed=5, device=device)
    layer = cluster_layer(drawn.keys, drawn.values, CLUSTERING, drawn.probe, drawn.scale)
    seen = Forest.of([ObservedLayer(layer, drawn.probe)])
    rules = calibrate(seen, BEST, (0.02, 0.1, 0.3))
    return drawn, layer, plain_twin(layer), rules


def plain_twin(layer):
    """The same tree over the model's own keys, in float64: centre 0, exact means."""
    keys = layer.keys.double() + layer.centre[:, None].double()
    values = layer.values.double()
    levels = tuple(
        replace(
            level,
            centroids=means(keys, level.key_offsets),
            mean_values=means(values, level.key_offsets),
            variance=level.variance.double(),
        )
        for level in layer.levels
    )
    zero = torch.zeros_like(layer.centre).double()
    slope = layer.value_slope.double()
    return ClusteredLayer(
        Rows(keys, values), layer.positions, layer.pinned, levels, slope, zero, layer.scale
    )


def means(rows, offsets):
    of_head = [
        torch.stack([own[a:b].mean(0) if b > a else own[0] * 0 for a, b in ends.unfold(0, 2, 1)])
        for own, ends in zip(rows, offsets, strict=True)
    ]
    return torch.stack(of_head)


def double_rule(rule):
    far = None if rule.far_alpha is None else rule.far_alpha.double()
    return replace(rule, alpha=rule.alpha.double(), far_alpha=far)


def check(attend, kind, dtype, budgets, block=False, rows=6, device="cpu", tokens=TOKENS):
    """Within one unit in the last place: rounding the output and the keys' deviations costs that.

    Where rounding moves a leaf across its threshold the two rightly differ, so queries count whose
    selections agree.
    """
    drawn, layer, twin, rules = case(kind, dtype, rows, device, tokens)
    query, values = drawn.query, drawn.suffix_values
    for budget in budgets:
        rule = rules.rule(0, budget, block)
        output, log_mass, read = attend(
            query, layer, rule, Suffix.of(layer, drawn.suffix_keys, values)
        )
        wide = query.double(), twin, double_rule(rule)
        exact, exact_mass, expected = reference.attend(*wide, Suffix(drawn.suffix_keys, values))
        same = alike(lookup(query, layer, rule), lookup(*wide), query, rule)
        common = layer.common_logit(query.double())
        masses = (log_mass.double() + common - exact_mass)[same]
        reach = (layer.scale * query.double().norm(dim=-1) * widest(layer))[same]
        assert (masses.abs() <= torch.finfo(dtype).eps * reach + 1e-4).all()
        miss = (output.double() - exact)[same].norm() / exact[same].norm()
        assert same.float().mean() > 0.25 and output.isfinite().all()
        assert miss <= torch.finfo(dtype).eps, f"budget {budget}: {miss:.5f}"
        leaf = int(layer.levels[-1].sizes.max())  # moved by rounding, for all queries of a block
        moved = leaf * min(rule.query_block, rows) if block else 20
        assert abs(int(read.sum()) - int(expected.sum())) <= 0.02 * int(expected.sum()) + moved


def widest(layer):
    """The norm of the longest key as it is stored: its rounding is what a logit may be off."""
    return layer.keys.double().norm(dim=-1).max()


def alike(found, expected, query, rule):
    """Whether two lookups keep the same leaves and drop the same nodes, for every `[B, Hq, Q]`."""
    block_of = query_blocks(query.shape[2], rule.query_block, query.device)
    kept = (found.kept == expected.kept).all(-1)[:, :, block_of].unsqueeze(2)
    dropped = (found.far_logits.isinf() == expected.far_logits.isinf()).all(-1)
    return (kept & dropped).flatten(1, 2)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", REAL_LIKE)
@pytest.mark.parametrize("attend", [reference.attend, cpu.attend], ids=["reference", "cpu"])
def test_attention_on_real_statistics_equals_float64_on_the_models_keys(attend, kind, dtype):
    check(attend, kind, dtype, BUDGETS)


@pytest.mark.parametrize("kind", ["common 100", "common 1000", "turning", "heavy tails"])
def test_blocks_of_queries_on_real_statistics_equal_float64_on_the_cpu(kind):
    check(cpu.attend, kind, torch.float16, (1.0, 0.1), block=True, rows=70)


@pytest.mark.parametrize("kind", ["common 1000", "turning"])
@pytest.mark.parametrize("block", [False, True], ids=["decode", "prefill"])
def test_kernels_on_real_statistics_equal_float64_on_the_models_keys(block, kind):
    rows = 20 if block else 2  # in float16: the interpreter multiplies no bfloat16
    check(triton.attend, kind, torch.float16, (1.0, 0.1), block, rows, interpreter.DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", REAL_LIKE)
@pytest.mark.parametrize("block", [False, True], ids=["decode", "prefill"])
def test_kernels_on_long_real_statistics_equal_float64_on_the_models_keys(block, kind, dtype):
    rows = 200 if block else 6
    check(triton.attend, kind, dtype, BUDGETS, block, rows, interpreter.DEVICE, tokens=4000)


def test_the_same_keys_without_a_centre_are_far_off(monkeypatch):
    """The control: what the tests above hold against is there."""
    monkeypatch.setattr(
        "squeezed.indexing.clustering.common_part", lambda keys, _: torch.zeros_like(keys[:, 0])
    )
    monkeypatch.setitem(globals(), "case", case.__wrapped__)
    with pytest.raises(AssertionError):
        check(reference.attend, "common 1000", torch.bfloat16, (0.3, 0.1, 0.02))
