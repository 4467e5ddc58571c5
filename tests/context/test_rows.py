"""Keys and values behind one door: where they lie, what they cost, and who can read them."""

from dataclasses import replace

import interpreter  # before any kernel
import pytest
import torch
from trees import random_layer

from squeezed.attention import cpu, reference, triton
from squeezed.context.bytes import LayerBytes
from squeezed.context.rows import Rows
from squeezed.context.rule import SelectionRule
from squeezed.context.storage.structure import tensors_of
from squeezed.errors import SqueezedError
from squeezed.methods import create

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def drawn(dtype=torch.float32, heads=3, tokens=7, dim=16):
    return Rows(*torch.randn(2, heads, tokens, dim).to(dtype).unbind())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_costs_a_key_and_a_value(dtype):
    rows = drawn(dtype)
    assert rows.bytes_per_row == 2 * 16 * dtype.itemsize
    assert rows.kv_bytes() == 3 * 7 * rows.bytes_per_row


def test_a_value_narrower_than_its_key_costs_less():
    rows = Rows(torch.zeros(2, 5, 16, dtype=torch.float16), torch.zeros(2, 5, 16).to(torch.int8))
    assert rows.bytes_per_row == 16 * 3 and rows.kv_bytes() == 10 * 16 * 3


def test_bytes_of_a_layer_are_those_of_its_rows():
    layer = random_layer(dtype=torch.float16)
    narrow = replace(layer, rows=Rows(layer.keys.to(torch.int8), layer.values, "8 bits"))
    for each, row in ((layer, 2 * 32 * 2), (narrow, 32 * 3)):
        assert LayerBytes.of(each).keys(10) == 10 * row
        assert each.kv_bytes() == 2 * 300 * row
    assert LayerBytes.of(narrow).row == LayerBytes.of(layer).row  # of mean keys and values
    assert narrow.index_bytes() == layer.index_bytes()


def test_heads_and_places_are_views_where_nothing_moves():
    rows = drawn()
    own = rows.of_heads(slice(1, 3))
    assert own.keys.equal(rows.keys[1:]) and own.values.equal(rows.values[1:])
    assert own.keys.untyped_storage().data_ptr() == rows.keys.untyped_storage().data_ptr()
    assert rows.to("cpu").keys is rows.keys and rows.to("meta").device.type == "meta"
    assert rows.wide(torch.float32)[0] is rows.keys
    keys, values = rows.wide(torch.float64)
    assert keys.dtype == values.dtype == torch.float64 and keys.equal(rows.keys.double())


def test_rows_of_some_tokens_come_in_their_order():
    rows, chosen = drawn(), torch.tensor([4, 0, 6])
    some = rows.of_tokens(chosen)
    assert some.keys.equal(rows.keys[:, chosen]) and some.values.equal(rows.values[:, chosen])
    assert rows.of_tokens(slice(2, 5)).tokens == 3


def test_a_layer_moves_and_is_cut_with_its_rows():
    layer = random_layer()
    half = layer.of_heads(slice(1, 2))
    assert half.keys.equal(layer.keys[1:]) and half.levels[0].centroids.shape[0] == 1
    there = layer.to("meta")
    assert all(tensor.device.type == "meta" for tensor in there.tensors())
    assert len(layer.tensors()) == len(there.tensors()) == 5 + 5 + 4
    assert layer.tensors()[0] is layer.rows.keys


@pytest.mark.parametrize(
    "attend, dtype, rows",
    [
        (reference.attend, torch.float32, 1),
        (cpu.attend, torch.float32, 1),
        (cpu.attend, torch.float32, 60),
        (triton.attend, torch.float16, 1),
        (triton.attend, torch.float16, 4),
    ],
)
def test_who_does_not_know_an_encoding_refuses_it(attend, dtype, rows):
    layer = random_layer(dtype=dtype).to(interpreter.DEVICE)
    strange = replace(layer, rows=replace(layer.rows, encoding="8 bits"))
    query = torch.zeros(1, 2, rows, 32, dtype=dtype, device=interpreter.DEVICE)
    rule = SelectionRule.for_all_heads((-9.0, -9.0), layer, None, "none", 64)
    attend(query, layer, rule)
    with pytest.raises(SqueezedError, match=r"expected plain .* got the encoding '8 bits'"):
        attend(query, strange, rule)


def test_no_method_or_file_takes_strange_numbers_for_keys():
    layer = random_layer()
    strange = replace(layer, rows=replace(layer.rows, encoding="8 bits"))
    for use in (
        lambda: strange.keys,
        lambda: strange.values,
        lambda: tensors_of(strange),
        lambda: create("dense").prepare(Layers(strange), 1.0)[0].attend(torch.zeros(1, 2, 1, 32)),
    ):
        with pytest.raises(SqueezedError, match="8 bits"):
            use()


class Layers:
    def __init__(self, *layers):
        self.clustered_layers = list(layers)
