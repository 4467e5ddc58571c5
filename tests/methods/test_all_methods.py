"""Claims that hold for every method of the registry."""

from dataclasses import replace

import pytest
import torch

from methods.contexts import BUDGETS, Call, random_call, random_context
from squeezed.attention import Suffix, merge
from squeezed.attention.reference import attend_suffix
from squeezed.errors import SqueezedError
from squeezed.methods import ALIASES, METHODS, create

NAMES = [*METHODS, *ALIASES]
SPARSE = [name for name in NAMES if name != "dense"]


def prepared(name, budget, context=None):
    if name == "retrieval":
        pytest.importorskip("faiss")
    return create(name, implementation="reference").prepare(context or random_context(), budget)


def outputs(layers, call, per_token=True):
    return [call.attend(layer, per_token) for layer in layers]


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("name", SPARSE)
def test_method_with_everything_kept_equals_dense(name, per_token):
    context, call = random_context(), random_call()
    dense = outputs(prepared("dense", 1.0, context), call)
    found = outputs(prepared(name, 1.0, context), call, per_token)
    for (output, mass, read), (expected, all_mass, all_read) in zip(found, dense, strict=True):
        torch.testing.assert_close(output, expected, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(mass, all_mass, rtol=2e-5, atol=2e-5)
        assert torch.equal(read, all_read)


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_context_alone_merged_with_the_suffix_equals_the_whole(name, per_token):
    call = random_call(rows=140, suffix=145)
    wholes = outputs(prepared(name, 0.1), call, per_token)
    for layer, whole in zip(prepared(name, 0.1), wholes, strict=True):
        alone = layer.attend(call.query, per_token=per_token)
        recent = attend_suffix(call.query, Suffix(call.keys, call.values), layer.layer.scale)
        merged = merge(alone, recent)
        torch.testing.assert_close(merged.output, whole.output, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(merged.log_mass, whole.log_mass, rtol=2e-5, atol=2e-5)
        assert torch.equal(merged.keys_read, whole.keys_read)


@pytest.mark.parametrize("name", SPARSE)
def test_method_at_a_small_budget_differs_from_dense_and_reads_less(name):
    context, call = random_context(), random_call()
    dense = outputs(prepared("dense", 1.0, context), call)[-1]
    output, _, read = outputs(prepared(name, 0.1, context), call)[-1]
    assert (output - dense[0]).abs().max() > 1e-3
    assert (read < 0.4 * dense.keys_read).all()


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_method_is_unmoved_by_neighbours_in_the_batch(name, per_token):
    layers, call = prepared(name, 0.1), random_call(batch=3, rows=140, suffix=145)
    together = outputs(layers, call, per_token)
    for request in range(3):
        alone = outputs(layers, call.of(request), per_token)
        for (output, mass, read), (one, one_mass, one_read) in zip(together, alone, strict=True):
            torch.testing.assert_close(output[request], one[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(mass[request], one_mass[0], rtol=1e-4, atol=1e-5)
            assert read[request] == one_read[0]


@pytest.mark.parametrize("name", NAMES)
def test_method_ignores_padding(name):
    layers, call = prepared(name, 0.1), random_call(rows=5, suffix=5)
    mask = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5).clone()
    mask[0, :, :, :2] = False  # two padded tokens on the left of the first request
    call.mask = mask
    padded = outputs(layers, call, per_token=False)
    for field in (call.query, call.keys, call.values):
        field[0, :, :2] = 1e4
    poisoned = outputs(layers, call, per_token=False)
    for (output, mass, read), (other, other_mass, other_read) in zip(padded, poisoned, strict=True):
        assert torch.isfinite(output).all() and torch.isfinite(other).all()
        torch.testing.assert_close(output[0, :, 2:], other[0, :, 2:])
        torch.testing.assert_close(mass, other_mass)
        assert (output[0, :, :2] == 0).all() and (mass[0, :, :2] == -torch.inf).all()
        assert torch.equal(read, other_read)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e-4, 1e3])
def test_method_stays_finite_for_extreme_logits(name, size):
    call = random_call()
    call.query *= size
    for output, mass, _ in outputs(prepared(name, 0.05), call):
        assert torch.isfinite(output).all() and torch.isfinite(mass).all()


@pytest.mark.parametrize("name", NAMES)
def test_method_attends_densely_to_a_context_too_short_to_cluster(name):
    context, call = random_context(), random_call()
    for i, layer in enumerate(context.clustered_layers):
        context.clustered_layers[i] = replace(layer, pinned=layer.tokens, levels=())
    dense = outputs(prepared("dense", 0.1, context), call)
    for layer, (expected, all_mass, _) in zip(prepared(name, 0.1, context), dense, strict=True):
        output, mass, read = call.attend(layer)
        torch.testing.assert_close(output, expected, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(mass, all_mass, rtol=2e-5, atol=2e-5)
        assert (read == 0).all() and layer.index_bytes(call.query) == 0


@pytest.mark.parametrize("name", SPARSE)
def test_method_reads_more_at_a_larger_budget(name):
    context, call = random_context(layers=5), random_call(rows=1)
    read = []
    for budget in BUDGETS:
        read.append(
            sum(
                int(found.keys_read.sum())
                for found in outputs(prepared(name, budget, context), call)
            )
        )
    assert read[0] < read[-1]


@pytest.mark.parametrize("name", NAMES)
def test_method_names_its_paper(name):
    assert create(name).paper.startswith(("https://arxiv.org/abs/", "none:"))


def test_create_lists_the_known_methods_for_an_unknown_one():
    with pytest.raises(SqueezedError, match=r"method: expected one of .*quest.*best.*'attend'"):
        create("attend")


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("name", [n for n in NAMES if n != "retrieval"])
def test_method_stays_on_its_device_and_never_waits_for_it(name, per_token):
    """Tensors on `meta` refuse both another device's tensors and every look at a value."""
    context, call = random_context(), random_call(rows=100, suffix=103)
    context.clustered_layers = [layer.to("meta") for layer in context.clustered_layers]
    context.observed = [queries.to("meta") for queries in context.observed]
    context.calibrations = {
        preset: replace(
            found,
            per_token=tuple(grid.to("meta") for grid in found.per_token),
            per_block=tuple(grid.to("meta") for grid in found.per_block),
            alpha=tuple(a if a is None else a.to("meta") for a in found.alpha),
            far_alpha=tuple(a if a is None else a.to("meta") for a in found.far_alpha),
        )
        for preset, found in context.calibrations.items()
    }
    call = Call(*(x.to("meta") for x in (call.query, call.keys, call.values)))
    for layer in create(name, implementation="reference").prepare(context, 0.1):
        output, mass, read = call.attend(layer, per_token)
        assert output.device.type == mass.device.type == read.device.type == "meta"
        layer.index_bytes(call.query)
