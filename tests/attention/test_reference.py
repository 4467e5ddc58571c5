"""The oracle itself, against dense attention and against the defining formulas."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from trees import far_alpha_for, random_layer

from squeezed.attention.interface import Suffix
from squeezed.attention.reference import attend
from squeezed.attention.reference.lookup import lookup
from squeezed.context.encoding import encoded, wide
from squeezed.context.rows import Rows
from squeezed.context.rule import SelectionRule
from squeezed.errors import SqueezedError

INF = float("inf")
SCALE = 0.2


def inputs(batch=2, heads=6, kv_heads=2, rows=5, suffix=9, dim=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, rows, dim, generator=generator)
    keys = torch.randn(batch, kv_heads, suffix, dim, generator=generator)
    return query, keys, torch.randn(keys.shape, generator=generator)


def dense(query, layer, keys, values, mask=None):
    batch, heads, rows, _ = query.shape
    group = heads // keys.shape[1]
    full = [
        torch.cat([context.expand(batch, -1, -1, -1), own], 2).repeat_interleave(group, 1)
        for context, own in ((layer.keys, keys), (layer.values, values))
    ]
    suffix = keys.shape[2]
    if mask is None:
        mask = torch.ones(rows, suffix, dtype=torch.bool).tril(suffix - rows)[None, None]
    context = torch.ones(*mask.shape[:3], layer.tokens, dtype=torch.bool)
    mask = torch.cat([context, mask], -1)
    return scaled_dot_product_attention(query, *full, mask, scale=SCALE)


@pytest.mark.parametrize("far_field", ["none", "first_order", "second_order"])
@pytest.mark.parametrize("nodes", [(24,), (6, 24), (3, 9, 40)])
def test_attend_with_everything_kept_equals_dense(nodes, far_field):
    layer = random_layer(nodes=nodes)
    query, keys, values = inputs()
    far_alpha = far_alpha_for(layer, far_field, query.shape[1] // 2)
    rule = SelectionRule.for_all_heads((-INF,) * len(nodes), layer, None, far_field, 2, far_alpha)
    output, _, keys_read = attend(query, layer, rule, Suffix(keys, values))
    torch.testing.assert_close(output, dense(query, layer, keys, values), atol=1e-5, rtol=1e-5)
    assert keys_read.tolist() == [layer.clustered * 2 * 5] * 2


@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize("threshold", [-INF, -6.0])
def test_attend_reads_encoded_rows_as_the_numbers_that_they_stand_for(name, threshold):
    layer = random_layer()
    written = encoded(layer, name)
    query, keys, values = (x.double() for x in inputs())
    rule = SelectionRule.for_all_heads((threshold,) * 2, layer, None, "first_order", 2)
    stood_for = replace(layer, rows=Rows(*wide(written, torch.float64)))
    found, expected, plain = (
        attend(query, each, rule, Suffix(keys, values)) for each in (written, stood_for, layer)
    )
    torch.testing.assert_close(found.output, expected.output)
    torch.testing.assert_close(found.log_mass, expected.log_mass)
    assert found.keys_read.equal(plain.keys_read)  # the index alone selects
    assert 1e-4 < (found.output - plain.output).norm() / plain.output.norm() < 0.15


def test_attend_at_a_high_threshold_is_not_dense_and_far_field_comes_closer():
    layer = random_layer()
    query, keys, values = inputs()
    expected = dense(query, layer, keys, values)
    errors = {}
    for far_field in ("none", "first_order"):
        rule = SelectionRule.for_all_heads((INF, INF), layer, None, far_field)
        output, _, keys_read = attend(query, layer, rule, Suffix(keys, values))
        assert keys_read.tolist() == [0, 0]
        errors[far_field] = (output - expected).norm() / expected.norm()
    assert errors["none"] > 0.1
    assert errors["first_order"] < errors["none"]


def test_kept_leaves_are_those_of_the_formula():
    layer = random_layer(kv_heads=1, nodes=(12,))
    query, _, _ = inputs(batch=1, heads=2, kv_heads=1, rows=1)
    alpha = torch.tensor([[0.5, 1.5]])
    level, threshold = layer.levels[0], -5.6
    wanted = torch.zeros(12, dtype=torch.bool)
    for head in range(2):
        q = query[0, head, 0].double()
        logits = [
            SCALE * float(q @ level.centroids[0, i].double())
            + float(alpha[0, head]) * 0.5 * SCALE**2 * float(q @ q) * float(level.variance[0, i])
            for i in range(12)
        ]
        sizes = level.sizes[0].tolist()
        total = sum(n * math.exp(x) for n, x in zip(sizes, logits, strict=True))
        for i, (n, x) in enumerate(zip(sizes, logits, strict=True)):
            wanted[i] |= n > 0 and math.exp(x) / total > math.exp(threshold)
    rule = SelectionRule.for_all_heads((threshold,), layer, alpha, "none")
    found = lookup(query, layer, rule)
    assert found.kept[0, 0, 0].equal(wanted) and wanted.any() and not wanted.all()


def test_every_head_selects_by_its_own_thresholds():
    layer = random_layer(kv_heads=2)
    query, _, _ = inputs(kv_heads=2)
    rule = SelectionRule(torch.tensor([[-INF, -INF], [-INF, INF]]), None, "none")
    kept = lookup(query, layer, rule).kept
    assert kept[:, 0].all(1).equal((layer.levels[-1].sizes[0] > 0).expand_as(kept[:, 0, 0]))
    assert not kept[:, 1].any()


def test_only_children_of_kept_nodes_are_kept_and_every_key_counts_once():
    layer = random_layer(nodes=(3, 9, 40))
    query, _, _ = inputs()
    rule = SelectionRule.for_all_heads((-5.8, -5.7, -5.6), layer, None, "first_order")
    found = lookup(query, layer, rule)
    read = torch.einsum("bhnc,hc->bhn", found.kept.double(), layer.levels[-1].sizes.double())
    dropped = found.far_logits > -INF  # [B, Hkv, G, Q, F]
    sizes = torch.cat([level.sizes for level in layer.levels], -1).double()
    far = torch.einsum("bhgqf,hf->bhgq", dropped.double(), sizes)
    assert (read[:, :, None] + far == layer.clustered).all()
    assert 0 < read.sum() < read.numel() * layer.clustered


def test_order_of_clusters_does_not_matter():
    layer = random_layer(nodes=(24,))
    query, keys, values = inputs()
    level = layer.levels[0]
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    rows, offsets = [], [torch.full((2,), layer.pinned)]
    for head in range(2):
        bounds = level.key_offsets[head].tolist()
        parts = [torch.arange(bounds[i], bounds[i + 1]) for i in order.tolist()]
        rows.append(torch.cat([torch.arange(layer.pinned), *parts]))
    sizes = level.sizes[:, order]
    offsets = torch.cat([torch.zeros(2, 1), sizes.cumsum(1)], 1).int() + layer.pinned
    pick = torch.stack(rows)[..., None].expand_as(layer.keys)
    shuffled = replace(
        layer,
        rows=Rows(layer.keys.gather(1, pick), layer.values.gather(1, pick)),
        levels=(
            replace(
                level,
                centroids=level.centroids[:, order],
                mean_values=level.mean_values[:, order],
                variance=level.variance[:, order],
                key_offsets=offsets,
            ),
        ),
    )
    rule = SelectionRule.for_all_heads((-5.6,), layer, None, "first_order", 2)
    first, second = (attend(query, each, rule, Suffix(keys, values)) for each in (layer, shuffled))
    torch.testing.assert_close(first[0], second[0], atol=1e-6, rtol=1e-5)
    assert first.keys_read.equal(second.keys_read)


def test_neighbours_in_a_batch_and_padding_do_not_matter():
    layer = random_layer()
    query, keys, values = inputs(rows=6, suffix=6)
    rule = SelectionRule.for_all_heads((-5.8, -5.6), layer, None, "first_order", 4)
    alone = attend(query[1:, :, 2:], layer, rule, Suffix(keys[1:, :, 2:], values[1:, :, 2:]))
    mask = torch.ones(6, 6, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[1, :, :, :2] = False  # the second request starts two tokens later
    mask[1, :, :2] = False
    together = attend(query, layer, rule, Suffix(keys, values, mask), mask.any(-1)[:, 0])
    torch.testing.assert_close(together[0][1:, :, 2:], alone[0], atol=1e-6, rtol=1e-5)
    assert together.keys_read[1] == alone.keys_read[0]
    assert not together[0].isnan().any()


@pytest.mark.parametrize("magnitude", [1e4, -1e4])
def test_huge_logits_do_not_overflow(magnitude):
    layer = random_layer(kv_heads=1)
    direction = torch.ones(1, 1, 1, 32) / 32**0.5
    keys = layer.keys + magnitude * direction[0]
    layer = random_layer(keys=keys)
    query = direction.expand(1, 2, 1, 32) / SCALE
    own = torch.zeros(1, 1, 1, 32)
    for far_field in ("none", "first_order", "second_order"):
        for threshold in (-INF, -5.0, INF):
            rule = SelectionRule.for_all_heads(
                (threshold,) * 2, layer, torch.ones(2, 2), far_field, 1,
                far_alpha_for(layer, far_field, 2),
            )  # fmt: skip
            output = attend(query, layer, rule, Suffix(own, own)).output
            assert output.isfinite().all()


def test_layer_without_clusters_is_dense():
    layer = replace(random_layer(), levels=(), pinned=300)
    query, keys, values = inputs()
    rule = SelectionRule.for_all_heads((), layer, None, "first_order")
    output, _, keys_read = attend(query, layer, rule, Suffix(keys, values))
    torch.testing.assert_close(output, dense(query, layer, keys, values), atol=1e-5, rtol=1e-5)
    assert keys_read.tolist() == [0, 0]


def test_second_order_far_field_is_that_of_the_formula():
    layer = random_layer(kv_heads=1, nodes=(12,))
    query, keys, values = (x.double() for x in inputs(batch=1, heads=2, kv_heads=1, rows=1))
    far_alpha, level = torch.tensor([0.5, 1.5]), layer.levels[0]
    rule = SelectionRule.for_all_heads((INF,), layer, None, "second_order", 1, far_alpha)
    output = attend(query, layer, rule, Suffix(keys, values)).output
    for head in range(2):
        q = query[0, head, 0]
        exact = [
            *zip(layer.keys[0, : layer.pinned].double(), layer.values[0].double(), strict=False),
            *zip(keys[0, 0], values[0, 0], strict=True),
        ]
        total, mass = torch.zeros(32, dtype=torch.float64), 0.0
        for key, value in exact:
            weight = math.exp(SCALE * float(q @ key))
            total, mass = total + weight * value, mass + weight
        for i, size in enumerate(level.sizes[0].tolist()):
            variance = float(level.variance[0, i])
            energy = float(far_alpha[head]) * (SCALE * float(q.norm())) ** 2 / 2
            logit = SCALE * float(q @ level.centroids[0, i].double()) + energy * variance
            moved = variance * SCALE * (layer.value_slope[0].double() @ q)
            weight = size * math.exp(logit)
            total = total + weight * (level.mean_values[0, i].double() + moved)
            mass += weight
        torch.testing.assert_close(output[0, head, 0], total / mass)


def test_a_rule_has_a_weight_for_the_far_field_exactly_where_it_is_of_second_order():
    layer = random_layer()
    for far_field, far_alpha in (("second_order", None), ("first_order", torch.ones(6))):
        with pytest.raises(SqueezedError, match="far_alpha"):
            SelectionRule.for_all_heads((0.0, 0.0), layer, None, far_field, 1, far_alpha)
