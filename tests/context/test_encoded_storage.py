"""Encoded contexts in files: what is saved is what is read, and nothing else passes."""

import pytest
import torch
from made import LAYER_FILE, made_context, same_context, with_manifest, with_tensors

from squeezed.attention import Suffix, reference
from squeezed.context.rule import SelectionRule
from squeezed.context.storage.directory import load
from squeezed.context.storage.saving import save
from squeezed.errors import ContextFileError, SqueezedError
from squeezed.hf.fixed_context import FixedContext

PLAIN = made_context()
CONTEXTS = {rows: PLAIN.encoded(rows) for rows in ("int4", "int8")}


@pytest.fixture(params=CONTEXTS)
def rows(request):
    return request.param


@pytest.fixture
def saved(rows, tmp_path):
    return save(CONTEXTS[rows], tmp_path / "manual.sqz")


def test_an_encoded_context_comes_back_bit_for_bit(rows, saved):
    loaded = load(saved)
    assert same_context(loaded, CONTEXTS[rows]) and loaded.rows == loaded.config.rows == rows
    assert loaded.rows_loss == CONTEXTS[rows].rows_loss
    assert loaded.outlines == CONTEXTS[rows].outlines


def test_files_shrink_with_the_bits(tmp_path):
    bytes_of = {
        rows: sum(file.stat().st_size for file in save(made, tmp_path / rows).glob("layer_002*"))
        for rows, made in (CONTEXTS | {"plain": PLAIN}).items()
    }
    saved_bytes = {rows: PLAIN.kv_bytes() - made.kv_bytes() for rows, made in CONTEXTS.items()}
    assert saved_bytes["int4"] > saved_bytes["int8"] > 0
    assert bytes_of["int4"] < bytes_of["int8"] < bytes_of["plain"]


def test_the_loss_is_that_of_dense_attention_on_the_probe(rows):
    made = CONTEXTS[rows]
    for place, (exact, written) in enumerate(
        zip(PLAIN.clustered_layers, made.clustered_layers, strict=True)
    ):
        rule = SelectionRule.for_all_heads((-torch.inf,) * 2, exact, None, "none")
        query = PLAIN.observed[place][None].double()
        none = Suffix(*query.new_empty(2, 1, exact.kv_heads, 0, exact.dim))
        outputs = [
            reference.attend(query, layer, rule, none).output[0].unflatten(0, (exact.kv_heads, -1))
            for layer in (exact, written)
        ]
        away, own = ((x.flatten(1)).norm(dim=1) for x in (outputs[1] - outputs[0], outputs[0]))
        expected = torch.tensor(made.rows_loss[place], dtype=torch.float64)
        torch.testing.assert_close(away / own, expected, rtol=1e-3, atol=0)


def first(tensor, value):
    tensor.view(-1)[0] = value


ALTERED = {
    "codes are missing": lambda t: t.pop("key_codes"),
    "an unknown tensor": lambda t: t.update(signs=torch.ones(16, dtype=torch.int8)),
    "codes of one row less": lambda t: t.update(value_codes=t["value_codes"][:, 1:].clone()),
    "codes of another width": lambda t: t.update(key_codes=t["key_codes"][..., 1:].clone()),
    "codes of another type": lambda t: t.update(key_codes=t["key_codes"].to(torch.int16)),
    "one head less": lambda t: t.update(scales=t["scales"][1:].clone()),
    "one scale for both": lambda t: t.update(scales=t["scales"][..., :1].clone()),
    "scales in float32": lambda t: t.update(scales=t["scales"].float()),
    "a scale below zero": lambda t: first(t["scales"], -1.0),
    "a scale that is no number": lambda t: first(t["scales"], float("nan")),
    "a turn that is no number": lambda t: first(t["key_turn"], float("inf")),
    "a turn of another shape": lambda t: t.update(value_turn=t["value_turn"][..., :8].clone()),
    "all rows in plain": lambda t: t.update(keys=torch.zeros(2, 90, 16)),
}


@pytest.mark.parametrize("name", ALTERED)
def test_tensors_that_no_encoded_layer_has_are_refused(name, saved):
    with_tensors(saved, LAYER_FILE, ALTERED[name])
    with pytest.raises(ContextFileError, match="no context looks like that"):
        load(saved).layers[2]


@pytest.mark.parametrize("rows", ["int8"], indirect=True)
def test_a_code_that_is_no_level_is_refused(saved):
    with_tensors(saved, LAYER_FILE, lambda t: first(t["key_codes"], -128))
    with pytest.raises(ContextFileError, match="key_codes: numbers from -128"):
        load(saved).layers[2]


def told(change):
    return lambda manifest: [change(layer) for layer in manifest["layers"]]


DESCRIPTIONS = {
    "an unknown encoding": told(lambda layer: layer.update(encoding="int3")),
    "a window that is encoded": lambda m: m["layers"][1].update(encoding="int4"),
    "two encodings": lambda m: m["layers"][0].update(encoding="plain"),
    "an encoding without clusters": told(lambda layer: layer.update(nodes=[], pinned=90)),
    "a loss for one head": lambda m: m.update(rows_loss=[[0.1], [0.1]]),
    "a loss for one layer": lambda m: m.update(rows_loss=m["rows_loss"][:1]),
    "a loss below zero": lambda m: m["rows_loss"][0].__setitem__(0, -0.1),
    "settings of no encoding": lambda m: m["config"].update(rows="int3"),
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_descriptions_that_no_encoded_context_has_are_refused(name, saved):
    with_manifest(saved, DESCRIPTIONS[name])
    with pytest.raises(ContextFileError, match="no context looks like that"):
        list(load(saved).layers)


def test_an_encoded_context_is_not_encoded_otherwise():
    made = CONTEXTS["int4"]
    assert made.encoded("int4") is made and PLAIN.encoded("plain") is PLAIN
    for rows in ("plain", "int8"):
        with pytest.raises(SqueezedError, match=r"needs plain keys and values, .* has 'int4'"):
            made.encoded(rows)
    with pytest.raises(SqueezedError, match="expected one of plain, int8, int4, got 'fp8'"):
        PLAIN.encoded("fp8")


def test_a_context_without_observed_queries_is_encoded_and_says_no_loss():
    made = FixedContext(**{**vars(PLAIN), "observed": ()}).encoded("int4")
    assert made.rows == "int4" and made.rows_loss == ()
