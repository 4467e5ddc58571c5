"""The port itself: the context alone, the suffix alone, both joined, and padding that is said.

Every implementation, Triton's in its interpreter where there is no GPU.
"""

from dataclasses import replace

import interpreter  # before any kernel
import pytest
import torch
from trees import far_alpha_for, random_layer

import squeezed
from squeezed.attention import Attended, Suffix, cpu, merge, reference, triton
from squeezed.attention.reference import attend_suffix
from squeezed.context.rule import SelectionRule
from squeezed.errors import SqueezedError
from squeezed.testing.rules import rule_for_budget

GROUP, DIM, BLOCK = 2, 16, 4
FAR_FIELDS = ("none", "first_order", "second_order")
ROWS = {"token": 1, "tokens alone": 3, "blocks": 7}
PORTS = {
    "reference": (reference.attend, torch.float32, "cpu"),
    "cpu": (cpu.attend, torch.float32, "cpu"),
    "cpu, 16 bits": (cpu.attend, torch.bfloat16, "cpu"),
    "triton": (triton.attend, torch.float16, interpreter.DEVICE),
}
BUDGETS = (1, 0.3, 0.1)
CASES = [
    (budget, far_field, [*ROWS][(i + j) % 3], [0, 1] if (i + j + k) % 2 else None)
    for i, budget in enumerate(BUDGETS)
    for j, far_field in enumerate(FAR_FIELDS)
    for k in range(2)
]
"""Every pair of budget and far field with and without padding, each over some number of tokens."""


def layer_of(dtype=torch.float32, device="cpu", **settings):
    settings = {"tokens": 100, "dim": DIM, "nodes": (4, 12), "pinned": 8, **settings}
    return random_layer(dtype=dtype, **settings).to(device)


def drawn(layer, rows, suffix=9, batch=2):
    """Query `[B, Hq, Q, D]` and suffix of that layer."""
    generator = torch.Generator().manual_seed(rows)
    heads = len(layer.keys)
    shapes = ((batch, heads * GROUP, rows, DIM), *[(batch, heads, suffix, DIM)] * 2)
    query, keys, values = (
        torch.randn(shape, generator=generator).to(layer.keys.dtype).to(layer.keys.device)
        for shape in shapes
    )
    return 2 * query, keys, values


def rule_of(layer, query, budget, far_field, block):
    """A rule that reads about so much for the first token; of all keys at 1."""
    if budget == 1:
        everything = (-torch.inf,) * len(layer.levels)
        rule = SelectionRule.for_all_heads(everything, layer, None, "none")
    else:
        rule = rule_for_budget(query[:, :, :1], layer, budget, 1.5, "none")
    far_alpha = far_alpha_for(layer, far_field, GROUP)
    return replace(rule, far_field=far_field, far_alpha=far_alpha, query_block=block)


def padding(rows, suffix, first, device):
    """A causal mask `[B, 1, Q, S]` whose requests have so many padded tokens first, and `valid`."""
    mask = torch.ones(rows, suffix, dtype=torch.bool).tril(suffix - rows)
    mask = mask.repeat(len(first), 1, 1, 1)
    valid = torch.ones(len(first), rows, dtype=torch.bool)
    for request, count in enumerate(first):
        valid[request, :count] = False
        mask[request, :, :count] = False
    return mask.to(device), valid.to(device)


def assert_close(found, exact, rounded):
    """Within twice the reference's own error in that precision, and a rounding of the output."""
    epsilon = torch.finfo(found.output.dtype).eps
    own, away = ((x.output.double() - exact.output).norm() for x in (rounded, found))
    assert away <= 2 * own + epsilon * exact.output.norm()
    finite = exact.log_mass.isfinite()
    assert found.log_mass.isfinite().equal(finite)
    own, away = ((x.log_mass.double() - exact.log_mass)[finite].abs() for x in (rounded, found))
    sums = 32 * torch.finfo(torch.float32).eps * (1 + exact.log_mass[finite].abs())
    assert (away <= 2 * own.max() + sums).all()
    assert found.keys_read.tolist() == exact.keys_read.tolist()


@pytest.mark.parametrize(("budget", "far_field", "kind", "padded"), CASES)
@pytest.mark.parametrize("port", PORTS)
def test_context_merged_with_suffix_equals_the_whole(port, budget, far_field, kind, padded):
    attend, dtype, device = PORTS[port]
    layer, rows = layer_of(dtype, device), ROWS[kind]
    query, keys, values = drawn(layer, rows)
    rule = rule_of(layer, query, budget, far_field, BLOCK if kind == "blocks" else 1)
    mask = valid = None
    if padded:
        mask, valid = padding(rows, 9, padded, device)
    suffix = Suffix(keys, values, mask)
    exact, rounded = (
        reference.attend(q, layer, rule, suffix, valid) for q in (query.double(), query)
    )
    whole = attend(query, layer, rule, suffix, valid)
    assert_close(whole, exact, rounded)
    alone = attend(query, layer, rule, valid=valid)
    recent = attend_suffix(query, suffix, layer.scale, valid)
    assert_close(merge(alone, recent), exact, rounded)
    assert_close(merge(recent, alone), exact, rounded)
    exact, rounded = (
        reference.attend(q, layer, rule, valid=valid) for q in (query.double(), query)
    )
    assert_close(alone, exact, rounded)
    if valid is not None:
        empty = ~valid[:, None].expand(whole.log_mass.shape)
        for found in (whole, alone):
            assert (found.output[empty] == 0).all() and (found.log_mass[empty] == -torch.inf).all()


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("port", PORTS)
def test_a_query_that_sees_no_suffix_is_no_padding(port, kind):
    attend, dtype, device = PORTS[port]
    layer, rows = layer_of(dtype, device), ROWS[kind]
    query, keys, values = drawn(layer, rows)
    rule = rule_of(layer, query, 0.3, "second_order", BLOCK if kind == "blocks" else 1)
    nothing = torch.zeros(2, 1, rows, 9, dtype=torch.bool, device=device)
    unseen = attend(query, layer, rule, Suffix(keys, values, nothing))
    empty = attend(query, layer, rule, Suffix(keys[:, :, :0], values[:, :, :0]))
    alone = attend(query, layer, rule)
    for found in (unseen, empty):
        torch.testing.assert_close(found.output, alone.output, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(found.log_mass, alone.log_mass, rtol=1e-5, atol=1e-5)
        assert found.keys_read.equal(alone.keys_read) and int(alone.keys_read.min()) > 0


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("rows", [1, 7])
def test_a_context_that_keeps_nothing_leaves_the_suffix(port, rows):
    attend, dtype, device = PORTS[port]
    layer = layer_of(dtype, device, pinned=0)
    query, keys, values = drawn(layer, rows)
    rule = SelectionRule.for_all_heads((1e9, 1e9), layer, None, "none", BLOCK)
    alone = attend(query, layer, rule)
    assert (alone.output == 0).all() and (alone.log_mass == -torch.inf).all()
    recent = attend_suffix(query, Suffix(keys, values), layer.scale)
    merged = merge(alone, recent)
    assert merged.output.equal(recent.output) and merged.log_mass.equal(recent.log_mass)


@pytest.mark.parametrize("port", PORTS)
def test_a_layer_without_a_tree_is_dense_alone_too(port):
    attend, dtype, device = PORTS[port]
    layer = layer_of(dtype, device)
    layer = replace(layer, levels=(), pinned=layer.tokens)
    query, _, _ = drawn(layer, 1)
    rule = SelectionRule.for_all_heads((), layer, None, "first_order")
    exact = attend_suffix(query.double(), Suffix(layer.keys[None], layer.values[None]), layer.scale)
    rounded = attend_suffix(query, Suffix(layer.keys[None], layer.values[None]), layer.scale)
    assert_close(attend(query, layer, rule), exact, rounded)


def test_merge_is_the_softmax_over_all_keys_whatever_the_order_and_number_of_parts():
    layer = layer_of(torch.float64)
    query, keys, values = drawn(layer, 5, suffix=12)
    mask = torch.rand(2, 1, 5, 12, generator=torch.Generator().manual_seed(0)) > 0.3
    whole = attend_suffix(query, Suffix(keys, values, mask), layer.scale)
    cuts = (slice(0, 1), slice(1, 7), slice(7, 12))
    parts = [
        attend_suffix(
            query, Suffix(keys[:, :, own], values[:, :, own], mask[..., own]), layer.scale
        )
        for own in cuts
    ]
    for order in ((0, 1, 2), (2, 0, 1)):
        merged = merge(*(parts[i] for i in order))
        torch.testing.assert_close(merged.output, whole.output)
        torch.testing.assert_close(merged.log_mass, whole.log_mass)


def part(mass, value, rows=2):
    return Attended(
        torch.full((1, 1, rows, 4), value), torch.full((1, 1, rows), mass), torch.tensor([3])
    )


@pytest.mark.parametrize("rest", [0.0, torch.nan])
def test_merge_with_an_empty_side_is_the_other_and_of_empty_sides_is_empty(rest):
    """Engines leave anything in the output of a row without keys."""
    empty, some = part(-torch.inf, rest), part(1.5, 2.0)
    for merged in (merge(empty, some), merge(some, empty), merge(some)):
        assert merged.output.equal(some.output) and merged.log_mass.equal(some.log_mass)
    nothing = merge(empty, empty)
    assert (nothing.output == 0).all() and (nothing.log_mass == -torch.inf).all()
    assert nothing.keys_read.tolist() == [6]


def test_merge_shows_nan_and_holds_large_masses():
    large = merge(part(5e4, 1.0), part(5e4, 3.0))
    torch.testing.assert_close(large.output, torch.full((1, 1, 2, 4), 2.0))
    torch.testing.assert_close(large.log_mass, torch.full((1, 1, 2), 5e4 + 0.6931472))
    assert merge(part(1.0, torch.nan), part(2.0, 1.0)).output.isnan().all()
    assert merge(part(torch.nan, 1.0), part(2.0, 1.0)).output.isnan().all()


def test_merge_takes_the_part_of_an_engine_that_counts_no_keys():
    merged = merge(part(0.0, 1.0), Attended(part(0.0, 3.0).output, part(0.0, 3.0).log_mass, 0))
    assert merged.keys_read.tolist() == [3]
    torch.testing.assert_close(merged.output, torch.full((1, 1, 2, 4), 2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_common_logit_makes_the_log_mass_that_of_the_models_keys(dtype):
    """Joined with a suffix whose keys nobody centred, as an engine's cache holds them."""
    layer = layer_of(torch.float64)
    centre = 3 * torch.randn(2, DIM, generator=torch.Generator().manual_seed(4)).double()
    layer = replace(layer, centre=centre)
    query, keys, values = drawn(layer, 3)
    query = query.to(dtype)
    rule = rule_of(layer, query, 0.3, "first_order", 1)
    whole = reference.attend(query, layer, rule, Suffix.of(layer, keys, values))
    alone = reference.attend(query, layer, rule)
    plain = alone._replace(log_mass=alone.log_mass + layer.common_logit(query))
    merged = merge(plain, attend_suffix(query, Suffix(keys, values), layer.scale))
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close(merged.output, whole.output, **tolerance)
    torch.testing.assert_close(
        merged.log_mass, whole.log_mass + layer.common_logit(query), **tolerance
    )


def test_the_public_call_chooses_an_implementation_and_takes_the_layers_scale():
    layer = layer_of()
    query, keys, values = drawn(layer, 3)
    rule = rule_of(layer, query, 0.3, "first_order", 1)
    suffix = squeezed.Suffix(keys, values)
    expected = reference.attend(query, layer, rule, suffix)
    for name in ("auto", "reference", "cpu"):
        found = squeezed.attend(query, layer, rule, suffix, implementation=name)
        assert isinstance(found, squeezed.Attended)
        torch.testing.assert_close(found.output, expected.output, rtol=1e-5, atol=1e-5)
    other = squeezed.attend(query, replace(layer, scale=2 * layer.scale), rule, suffix)
    assert (other.output - expected.output).abs().max() > 1e-2
    with pytest.raises(SqueezedError, match="implementation"):
        squeezed.attend(query, layer, rule, implementation="gpu")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(query=lambda q: q[:, :3]), "query: expected .*multiple of 2"),
        (dict(query=lambda q: q[..., :8]), "query: expected"),
        (dict(query=lambda q: q[0]), "query: expected"),
        (dict(keys=lambda k: k[:1]), r"suffix.keys: expected \[2, 2, 9, 16\]"),
        (dict(values=lambda v: v[:, :, 1:]), "suffix.values: expected"),
        (dict(mask=lambda m: m[..., 1:]), "suffix.mask: expected"),
        (dict(mask=lambda m: m.float()), "suffix.mask: expected bool"),
        (dict(valid=lambda v: v[:, 1:]), "valid: expected"),
        (dict(valid=lambda v: v.long()), "valid: expected bool"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_in_one_line(change, words):
    layer = layer_of()
    query, keys, values = drawn(layer, 3)
    mask, valid = padding(3, 9, [0, 1], "cpu")
    inputs = dict(query=query, keys=keys, values=values, mask=mask, valid=valid)
    inputs |= {name: change[name](inputs[name]) for name in change}
    rule = rule_of(layer, query, 1, "none", 1)
    suffix = Suffix(inputs["keys"], inputs["values"], inputs["mask"])
    with pytest.raises(SqueezedError, match=words) as refused:
        squeezed.attend(inputs["query"], layer, rule, suffix, inputs["valid"])
    assert "\n" not in str(refused.value)
