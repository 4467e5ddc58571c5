"""Prefill kernels against the reference: tiny under Triton's interpreter, larger on a GPU."""

import math
from dataclasses import replace

import interpreter
import poison
import pytest
import torch
from devices import gpu
from trees import far_alpha_for, random_layer

from squeezed.attention import Suffix
from squeezed.attention.reference import attend as reference
from squeezed.attention.scores import NEG_INF
from squeezed.attention.triton import gpus
from squeezed.attention.triton.prefill import launch
from squeezed.attention.triton.prefill.hopper import kernel as prefill_hopper
from squeezed.attention.triton.prefill.launch import prefill
from squeezed.context.layers import ClusteredLayer, Level
from squeezed.context.rows import Rows
from squeezed.context.rule import SelectionRule
from squeezed.testing.compared import assert_matches_reference

DEVICE = interpreter.DEVICE
KV_HEADS = 2
FAR_FIELDS = ("none", "first_order", "second_order")


def inputs(kv_heads=2, group=1, rows=12, suffix=15, dim=16, batch=1, dtype=torch.float32, seed=1):
    """Query `[B, Hq, Q, D]` and suffix keys and values `[B, Hkv, S, D]`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, kv_heads * group, rows, dim), *[(batch, kv_heads, suffix, dim)] * 2]
    query, keys, values = (torch.randn(s, generator=generator) for s in shapes)
    return [t.to(dtype).to(DEVICE) for t in (2 * query, keys, values)]


def layer_of(**settings):
    settings = {
        "kv_heads": KV_HEADS,
        "tokens": 200,
        "dim": 16,
        "nodes": (6, 24),
    } | settings
    return random_layer(**settings).to(DEVICE)


def quarter(layer):
    return replace(layer, scale=0.25)


def rule_of(thresholds, far_field="none", block=8, heads=None):
    generator = torch.Generator().manual_seed(2)
    alpha = None if heads is None else torch.rand(len(thresholds), heads, generator=generator)
    column = torch.tensor(thresholds, device=DEVICE)[:, None]
    alpha = None if alpha is None else alpha.to(DEVICE)
    own = torch.linspace(0.2, 0.9, heads or KV_HEADS, device=DEVICE)
    far_alpha = own if far_field == "second_order" else None
    return SelectionRule(column.repeat(1, KV_HEADS), alpha, far_field, block, far_alpha)


def mask_of(rows, suffix, padded):
    """`[B, 1, Q, S]`: causal, and the first `padded[b]` tokens of request `b` are padding."""
    mask = torch.ones(rows, suffix, dtype=torch.bool).tril(suffix - rows)
    mask = mask.repeat(len(padded), 1, 1, 1)
    for request, count in enumerate(padded):
        mask[request, :, :, :count] = False
        mask[request, :, : max(0, count - (suffix - rows))] = False
    return mask.to(DEVICE)


def upper_threshold(layer):
    """A threshold of the levels above the leaves that keeps part of their nodes."""
    return -math.log(layer.clustered) - 2.3


def threshold_keeping(layer, query, share, block):
    """A leaf threshold, far from every score, with which about `share` of the keys are read."""
    low, high = -30.0, 5.0
    for _ in range(12):
        middle = (low + high) / 2
        rule = rule_of((NEG_INF,) * (len(layer.levels) - 1) + (middle,), block=block)
        suffix = query.new_zeros(
            query.shape[0], layer.keys.shape[0], query.shape[2], query.shape[3]
        )
        own = replace(layer, scale=query.shape[3] ** -0.5)
        read = reference(query, own, rule, Suffix(suffix, suffix)).keys_read.sum()
        cells = query.shape[0] * query.shape[2] * layer.keys.shape[0] * layer.clustered
        low, high = (middle, high) if int(read) > share * cells else (low, middle)
    return high


def check(layer, rule, query, keys, values, mask=None, scale=None):
    """Output within twice the reference's own error, equal counts; returns both."""
    layer = replace(layer, scale=scale or query.shape[-1] ** -0.5)
    group = query.shape[1] // layer.keys.shape[0]
    rule = replace(rule, far_alpha=far_alpha_for(layer, rule.far_field, group))
    valid = None if mask is None else mask.any(-1)[:, 0]
    operands = query, layer, rule, Suffix(keys, values, mask), valid
    found = prefill(*operands)
    # In 16 bits one rounding of the weights, as the tensor cores take them.
    roundings = 8 if query.dtype == torch.float32 else 1
    assert_matches_reference(found, *operands, floor=roundings * torch.finfo(query.dtype).eps)
    return found.output, found.keys_read


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    poison.buffers(monkeypatch)


@pytest.mark.parametrize("tokens", [200, gpu(3000)])
@pytest.mark.parametrize("far_field", FAR_FIELDS)
@pytest.mark.parametrize(
    "group, rows, nodes", [(1, 13, (5, 20)), (3, 8, (20,)), (1, 9, (3, 9, 40))]
)
def test_prefill_equals_reference(far_field, group, rows, nodes, tokens):
    layer = layer_of(nodes=nodes, tokens=tokens)
    query, keys, values = inputs(group=group, rows=rows)
    leaf = threshold_keeping(layer, query, 0.3, 8)
    rule = rule_of((upper_threshold(layer),) * (len(nodes) - 1) + (leaf,), far_field)
    _, keys_read = check(layer, rule, query, keys, values)
    assert 0 < int(keys_read) < 0.7 * layer.clustered * 2 * rows


@pytest.mark.parametrize("tokens", [200, gpu(3000)])
@pytest.mark.parametrize("far_field", FAR_FIELDS)
def test_prefill_second_order_equals_reference(far_field, tokens):
    layer = layer_of(tokens=tokens)
    query, keys, values = inputs(group=2)
    check(layer, rule_of((-7.0, -5.5), far_field, heads=4), query, keys, values)


def test_every_head_selects_by_its_own_thresholds():
    layer = layer_of()
    query, keys, values = inputs(group=2)
    rule = rule_of((-7.0, -5.5), "first_order")
    rule.log_thresholds[:, 0], rule.log_thresholds[:, 1] = NEG_INF, 1e4
    _, keys_read = check(layer, rule, query, keys, values)
    assert keys_read.tolist() == [layer.clustered * query.shape[2]]


@pytest.mark.parametrize("far_field", FAR_FIELDS)
def test_prefill_padding_moves_no_neighbour(far_field):
    layer = layer_of()
    query, keys, values = inputs(batch=2, rows=12, suffix=15)
    rule = rule_of((-7.0, -5.5), far_field)
    mask = mask_of(12, 15, [0, 9])
    output, keys_read = check(layer, rule, query, keys, values, mask)
    for request in range(2):
        one = slice(request, request + 1)
        own = Suffix(keys[one], values[one], mask[one])
        alone, _, read = prefill(query[one], quarter(layer), rule, own, mask[one].any(-1)[:, 0])
        torch.testing.assert_close(output[one], alone, rtol=2e-5, atol=2e-5)
        assert keys_read[one].tolist() == read.tolist()


def test_prefill_everything_kept_equals_dense():
    layer = layer_of()
    query, keys, values = inputs()
    for far_field in FAR_FIELDS:
        rule = rule_of((NEG_INF, NEG_INF), far_field)
        output, _, keys_read = prefill(query, quarter(layer), rule, Suffix(keys, values))
        all_keys = torch.cat([layer.keys[None], keys], 2)
        all_values = torch.cat([layer.values[None], values], 2)
        rows = query.shape[2]
        mask = torch.ones(rows, all_keys.shape[2], dtype=torch.bool, device=DEVICE)
        mask = mask.tril(all_keys.shape[2] - rows)
        dense = torch.nn.functional.scaled_dot_product_attention(
            query, all_keys, all_values, attn_mask=mask, scale=0.25
        )
        torch.testing.assert_close(output, dense, rtol=1e-5, atol=1e-5)
        assert int(keys_read) == layer.clustered * 2 * rows


def test_prefill_nothing_kept_reads_pinned_and_suffix_alone():
    layer = layer_of()
    query, keys, values = inputs()
    output, keys_read = check(layer, rule_of((1e4, 1e4)), query, keys, values)
    assert int(keys_read) == 0
    everything, _, _ = prefill(
        query, quarter(layer), rule_of((NEG_INF, NEG_INF)), Suffix(keys, values)
    )
    assert (output - everything).norm() > 1e-2 * everything.norm()


@pytest.mark.parametrize("far_field", FAR_FIELDS)
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_prefill_survives_extreme_logits(far_field, offset):
    generator = torch.Generator().manual_seed(5)
    raw = torch.randn(2, 120, 16, generator=generator)
    raw[:, :, 0] = offset / 4  # with the query's first entry at 16 and scale 1/4: logits of offset
    layer = layer_of(keys=raw, nodes=(4, 12))
    query, keys, values = inputs(rows=9, suffix=9)
    query[..., 0] = 16.0
    keys[..., 0] = offset / 4
    operands = quarter(layer), rule_of((-6.0, -5.0), far_field), Suffix(keys, values)
    output = prefill(query, *operands).output
    expected = reference(query.double(), *operands).output
    assert output.isfinite().all()
    # logits of 1e4 keep 2^-10 of absolute precision in float32
    torch.testing.assert_close(output.double(), expected, rtol=5e-3, atol=5e-3)


def test_prefill_rows_of_padding_alone_are_zero():
    layer = layer_of(pinned=0)
    query, keys, values = inputs(rows=10, suffix=10)
    mask = mask_of(10, 10, [10])
    operands = quarter(layer), rule_of((-7.0, -5.5)), Suffix(keys, values, mask)
    output, log_mass, keys_read = prefill(query, *operands, mask.any(-1)[:, 0])
    assert (output == 0).all() and int(keys_read) == 0 and (log_mass == NEG_INF).all()


@pytest.mark.parametrize("far_field", FAR_FIELDS)
def test_prefill_one_cluster_holds_all_keys(far_field):
    layer = layer_of(nodes=(1, 1))
    query, keys, values = inputs(rows=9)
    check(layer, rule_of((-9.0, -9.0), far_field), query, keys, values)
    check(layer, rule_of((9.0, 9.0), far_field), query, keys, values)


def test_prefill_short_context_without_tree_is_dense():
    layer = layer_of(tokens=40)
    layer = replace(layer, pinned=layer.tokens, levels=())
    query, keys, values = inputs()
    output, keys_read = check(layer, rule_of((-7.0, -5.5)), query, keys, values)
    assert output.isfinite().all() and int(keys_read) == 0


def test_prefill_cut_into_pieces_changes_nothing(monkeypatch):
    layer = layer_of()
    query, keys, values = inputs(rows=19)
    rule = rule_of((-7.0, -5.5), "first_order")
    whole, _, read = prefill(query, quarter(layer), rule, Suffix(keys, values))
    monkeypatch.setattr(launch, "WORK_BYTES", 1)
    cut, _, cut_read = prefill(query, quarter(layer), rule, Suffix(keys, values))
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-5)
    assert cut_read.tolist() == read.tolist()


def test_prefill_accepts_strided_queries_and_suffixes():
    layer = layer_of()
    query, keys, values = inputs()
    rule = rule_of((-7.0, -5.5))
    expected, _, _ = prefill(query, quarter(layer), rule, Suffix(keys, values))
    strided = query.transpose(1, 2).contiguous().transpose(1, 2)
    longer = torch.cat([keys, keys.new_full((1, 2, 5, 16), float("nan"))], 2)[:, :, :-5]
    output, _, _ = prefill(strided, quarter(layer), rule, Suffix(longer, values))
    assert torch.equal(output, expected)


@pytest.fixture(params=[gpu("hopper", generation=gpus.HOPPER), gpu("any GPU")])
def kernel(request, monkeypatch):
    """Both attention kernels, on 16-bit tensor cores: one is for Hopper GPUs alone."""
    if request.param == "any GPU":
        monkeypatch.setattr(prefill_hopper, "fits", lambda *sizes: False)


def half_inputs(dim=128, dtype=torch.bfloat16, nodes=(50, 250), **settings):
    layer = layer_of(dim=dim, dtype=dtype, tokens=5000, nodes=nodes)
    return layer, *inputs(dim=dim, dtype=dtype, **{"rows": 300, "suffix": 310} | settings)


def half_rule(layer, far_field, block=128):
    upper = upper_threshold(layer)
    return rule_of((upper - 1.5,) * (len(layer.levels) - 1) + (upper,), far_field, block)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "dim, group, block", [(128, 1, 128), (64, 4, 64), (128, 3, 128), (96, 2, 64), (256, 1, 64)]
)
def test_prefill_half_precision_equals_reference(kernel, dtype, dim, group, block):
    layer, *operands = half_inputs(dim, dtype, group=group)
    for far_field in FAR_FIELDS:
        check(layer, half_rule(layer, far_field, block), *operands)


@pytest.mark.parametrize("far_field", ["none", "second_order"])
def test_prefill_half_precision_under_a_mask_equals_reference(kernel, far_field):
    layer, *operands = half_inputs(batch=2)
    check(layer, half_rule(layer, far_field), *operands, mask_of(300, 310, [0, 150]))


@pytest.mark.parametrize("nodes", [(1, 1), (250,), (9, 50, 250)])
@pytest.mark.parametrize("leaf", [NEG_INF, None, 1e4])
def test_prefill_half_precision_of_any_tree_and_share_equals_reference(kernel, nodes, leaf):
    layer, *operands = half_inputs(nodes=nodes, kv_heads=2)
    rule = half_rule(layer, "second_order")
    if leaf is not None:
        rule.log_thresholds[-1] = leaf
    check(layer, rule, *operands)


def test_prefill_half_precision_without_tree_is_dense(kernel):
    layer, *operands = half_inputs()
    layer = replace(layer, pinned=layer.tokens, levels=())
    _, keys_read = check(layer, rule_of((-7.0, -5.5), block=128), *operands)
    assert int(keys_read) == 0


def test_prefill_half_precision_of_unaligned_suffixes_equals_reference(kernel):
    layer, query, *suffix = half_inputs()
    wide = [
        torch.full((1, 2, 310, 131), float("nan"), dtype=x.dtype, device=DEVICE) for x in suffix
    ]
    views = [w[..., 1:129].copy_(x) for w, x in zip(wide, suffix, strict=True)]
    check(layer, half_rule(layer, "none"), query, *views)


def test_prefill_half_precision_is_the_same_every_time(kernel):
    layer, *operands = half_inputs()
    rule = half_rule(layer, "second_order")
    rule = replace(rule, far_alpha=far_alpha_for(layer, rule.far_field, 1))
    first, _, _ = prefill(operands[0], layer, rule, Suffix(*operands[1:]))
    for _ in range(50):  # a race would show in one of them
        again, _, _ = prefill(operands[0], layer, rule, Suffix(*operands[1:]))
        assert torch.equal(again, first)


@pytest.mark.parametrize("far_field", FAR_FIELDS)
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_prefill_half_precision_survives_extreme_logits(kernel, far_field, offset):
    generator = torch.Generator().manual_seed(5)
    raw = torch.randn(2, 3000, 128, generator=generator)
    raw[:, :, 0] = offset / 4  # with the query's first entry at 16 and scale 1/4: logits of offset
    layer = layer_of(keys=raw.half(), nodes=(40, 120), dim=128, dtype=torch.float16)
    query, keys, values = inputs(rows=200, suffix=200, dim=128, dtype=torch.float16)
    query[..., 0], keys[..., 0] = 16.0, offset / 4
    rule = rule_of((-9.0, -8.0), far_field, 128)
    output, _, _ = prefill(query, quarter(layer), rule, Suffix(keys, values))
    expected = reference(query.double(), quarter(layer), rule, Suffix(keys, values)).output
    # logits of 1e4 keep 2^-10 of absolute precision in float32, weights and output 2^-11
    torch.testing.assert_close(output.double(), expected, rtol=1e-2, atol=2e-2)


@pytest.mark.gpu(memory_gb=12)
def test_prefill_offsets_beyond_31_bits_equal_reference(kernel):
    tokens = (1 << 31) // 128 + 4096
    keys = torch.randn(1, tokens, 128, dtype=torch.bfloat16, device="cuda")
    ends = torch.tensor([[16, tokens - 4000, tokens - 1000, tokens]], dtype=torch.int32)
    centroids = torch.stack([keys[:, a:b].float().mean(1) for a, b in ends[0].unfold(0, 2, 1)], 1)
    level = Level(centroids.bfloat16(), centroids.bfloat16(), torch.zeros(1, 3), ends).to("cuda")
    slope = keys.new_zeros(1, 128, 128)
    centre = keys.new_zeros(1, 128)
    layer = ClusteredLayer(
        Rows(keys, keys), torch.zeros(1, 1).int(), 16, (level,), slope, centre, 0.1
    )
    query, recent, values = inputs(kv_heads=1, rows=128, suffix=128, dim=128, dtype=keys.dtype)
    query[:] = 2000 * centroids[0, 2]  # only the last cluster, far beyond 2^31 elements
    rule = SelectionRule.for_all_heads((-8.0,), layer, None, "none", 128)
    output, _, read = prefill(query, layer, rule, Suffix(recent, values))
    rows = torch.cat([keys[:, :16], keys[:, tokens - 1000 :]], 1)[None]
    mask = torch.ones(128, 1144, dtype=torch.bool, device="cuda").tril(1016)
    dense = torch.nn.functional.scaled_dot_product_attention(
        query.float(), torch.cat([rows, recent], 2).float(), torch.cat([rows, values], 2).float(),
        attn_mask=mask, scale=0.1,
    )  # fmt: skip
    assert int(read) == 1000 * 128
    torch.testing.assert_close(output.float(), dense, atol=2e-2, rtol=2e-2)
