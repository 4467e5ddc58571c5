"""Schemes of few bits: what they lose, what they cost, and that attention reads what is left."""

from dataclasses import replace

import pytest
import torch
from made import made_context

from squeezed.attention import reference
from squeezed.context.bytes import LayerBytes
from squeezed.context.rule import SelectionRule
from squeezed.methods import FEW_BITS, create
from squeezed.methods.quantised import lossy
from squeezed.methods.schemes import SCHEMES, normal_levels

CONTEXT = made_context()
ROWS = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
COSTS = {"fp8": 8, "rtn": 5, "kivi": 5, "rotation": 4.25, "gear": 4 + 32 / 400 + 0.64 + 1.16}


def relative(found, rows):
    return float((found - rows).norm() / rows.norm())


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_loses_less_with_more_bits_and_says_what_they_cost(name, keys):
    found, cost = SCHEMES[name](ROWS, 4, keys)
    if name != "gear" or keys:
        assert cost == pytest.approx(COSTS[name], abs=0.01)
    errors = [relative(SCHEMES[name](ROWS, bits, keys)[0], ROWS) for bits in (2, 3, 4, 8)]
    assert found.shape == ROWS.shape and errors[3] > 0.0
    if name != "fp8":
        assert errors == sorted(errors, reverse=True) and errors[2] < 0.13 < errors[0]


def test_levels_are_those_of_lloyd_and_max():
    expected = [0.4528, 1.5104]  # Max, IRE Trans. IT-6 (1960), table I
    assert normal_levels(2)[2:].tolist() == pytest.approx(expected, abs=3e-3)
    assert float(normal_levels(4)[-1]) == pytest.approx(2.733, abs=0.03)
    error = relative(SCHEMES["rotation"](ROWS, 4, True)[0], ROWS)
    assert 0.085 < error < 0.0975  # that of one scale for all; each row has its best one


def test_outliers_cost_even_levels_much_and_what_keeps_them_apart_little():
    rows = ROWS.clone()
    rows[::50, 3] = 100.0
    assert relative(SCHEMES["kivi"](rows, 4, True)[0], rows) > 2 * relative(
        SCHEMES["gear"](rows, 4, True)[0], rows
    )


def test_differences_and_fitted_matrices_each_lose_less():
    layer, queries = CONTEXT.layers[0], CONTEXT.observed[0]
    errors = {}
    for scheme in ("rotation", "differences", "rows"):
        found = lossy(layer, scheme, 3, True, queries)
        errors[scheme] = relative(found.keys[:, layer.pinned :], layer.keys[:, layer.pinned :])
        assert found.keys[:, : layer.pinned].equal(layer.keys[:, : layer.pinned])
    assert errors["differences"] < errors["rotation"] < 0.3
    assert errors["rows"] < 0.3


def test_keys_as_the_model_makes_them_are_moved_there_and_back():
    layer = CONTEXT.layers[0]
    moved = replace(layer, centre=torch.full_like(layer.centre, 64.0))
    near, far = (lossy(x, "fp8", 8, False, None).keys for x in (layer, moved))
    assert relative(near, layer.keys) < 0.05 < relative(far, layer.keys)
    assert lossy(moved, "fp8", 8, True, None).keys.equal(lossy(layer, "fp8", 8, True, None).keys)


@pytest.mark.parametrize("name", ["kivi4", "fp8-raw", "rows3", "int4", "best-rows4", "best-int8"])
def test_attention_reads_what_a_scheme_leaves(name):
    settings = FEW_BITS[name][1]
    layer = lossy(
        CONTEXT.layers[0],
        settings["scheme"],
        settings["bits"],
        settings.get("centred", True),
        CONTEXT.observed[0],
    )
    query = torch.randn(1, 4, 2, 16)
    prepared = create(name, implementation="reference").prepare(CONTEXT, 0.3)[0]
    rule = SelectionRule.for_all_heads((-torch.inf,) * 2, layer, None, "none")
    rule = prepared.rule if settings.get("selects") else rule
    expected = reference.attend(query, layer, rule)
    found = prepared.attend(query, per_token=True)
    torch.testing.assert_close(found.output, expected.output)
    bits = LayerBytes.of(prepared.layer).keys(1) * 8 / 32
    assert settings["bits"] <= bits < settings["bits"] + 6 or name.endswith(("int4", "int8"))
