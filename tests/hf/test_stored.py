"""A fingerprint from a file is what `model_fingerprint` makes, or is refused in one line."""

import copy

import pytest
import torch
from made import with_manifest
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.errors import ContextFileError
from squeezed.hf.cache import suffix_mask
from squeezed.hf.identity.fingerprint import check_model, difference, model_fingerprint
from squeezed.hf.identity.stored import check_stored

WEIGHT = "layers.1.self_attn.q_proj.weight"
LONG = "layers." + "9" * 5000 + ".self_attn.q_proj.weight"
SHORT = {"max_new_tokens": 3}


@pytest.fixture(scope="module")
def made():
    return model_fingerprint(tiny_model())


@pytest.fixture(scope="module")
def context():
    return squeezed.index(tiny_model(), tiny_tokenizer(), document(300))


def entry(place, value):
    def change(made):
        made["weights"][WEIGHT][place] = value

    return change


def field(*names, value):
    def change(made):
        *outer, last = names
        for name in outer:
            made = made[name]
        made[last] = value

    return change


CRAFTED = {
    "no weights": lambda made: made.pop("weights"),
    "no behaviour": lambda made: made.pop("behaviour"),
    "no numbers": lambda made: made.pop("numbers"),
    "no partial": lambda made: made.pop("partial"),
    "weights a list": field("weights", value=[]),
    "numbers a number": field("numbers", value=5),
    "numbers not digests": field("numbers", value={"eps": 1e-5}),
    "packed a text": field("packed", value="yes"),
    "an entry of nothing": field("weights", WEIGHT, value=None),
    "an entry of letters": field("weights", WEIGHT, value="abcde"),
    "a short entry": lambda made: made["weights"][WEIGHT].pop(),
    "an unknown kind": entry(0, "mended"),
    "a kind that is none": entry(0, ["plain"]),
    "a type that torch has not": entry(1, "nothing"),
    "a function of torch": entry(1, "load"),
    "rows below zero": entry(2, -1),
    "rows beyond counting": entry(2, 10**300),
    "rows in letters": entry(2, "3"),
    "no numbers in a sketch": entry(3, ""),
    "half a number": entry(3, "QUJD"),
    "other letters": entry(3, "@@@@"),
    "letters beyond ASCII": entry(3, "é"),
    "a sketch of another size": entry(3, "AAAA" * 64),
    "too many roundings": entry(4, "AAAA" * 64),
    "no tokens to try": field("behaviour", "ids", value=[]),
    "a document to try": field("behaviour", "ids", value=[1] * 100_000),
    "tokens below zero": field("behaviour", "ids", value=[-1] * 16),
    "tokens beyond counting": field("behaviour", "ids", value=[2**63] * 16),
    "tokens between two": field("behaviour", "ids", value=[0.5] * 16),
    "tokens that say yes": field("behaviour", "ids", value=[True] * 16),
    "keys of no layer": field("behaviour", "projected", value=""),
    "half a layer": field("behaviour", "projected", value="AAAA" * 64),
    "a type of letters": field("behaviour", "dtype", value=[]),
    "behaviour of letters": field("behaviour", value="x"),
}


def test_a_models_own_fingerprint_is_accepted(made):
    assert check_stored(made) is made
    unseen = {**made, "behaviour": None, "partial": True, "engine": {"quantization": None}}
    assert check_stored(unseen) is unseen


@pytest.mark.parametrize("change", CRAFTED.values(), ids=CRAFTED)
def test_crafted_fingerprints_are_refused(change, made):
    crafted = copy.deepcopy(made)
    change(crafted)
    with pytest.raises(ContextFileError, match=r"model.*; no context says that") as refused:
        check_stored(crafted)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("crafted", ["of no model", None, {}, [], 5])
def test_what_is_no_record_is_no_fingerprint(crafted):
    with pytest.raises(ContextFileError, match="model"):
        check_stored(crafted)


def test_crafted_fingerprints_are_refused_wherever_a_context_meets_a_model(context, tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    for change in (CRAFTED["a document to try"], CRAFTED["a short entry"], CRAFTED["no weights"]):
        path = context.save(tmp_path / "c.sqz")
        with_manifest(path, lambda manifest, change=change: change(manifest["model"]))
        with pytest.raises(ContextFileError, match="no context says that"):
            squeezed.load(path, model)
        loaded = squeezed.load(path)  # without a model nothing is compared
        for meet in (
            lambda found: squeezed.generate(model, tokenizer, found, "who?", **SHORT),
            lambda found: found.cache(),
        ):
            with pytest.raises(ContextFileError, match="no context says that"):
                meet(loaded)


def test_names_with_endless_numbers_are_no_layers(context, tmp_path):
    path = context.save(tmp_path / "c.sqz")
    with_manifest(
        path, lambda x: x["model"]["weights"].update({LONG: x["model"]["weights"][WEIGHT]})
    )
    loaded, model = squeezed.load(path), copy.deepcopy(tiny_model())
    model.set_attn_implementation("squeezed")
    ids = torch.tensor([[60, 61]])
    mask = suffix_mask(len(loaded.tokens), torch.ones_like(ids))
    output = model.generate(ids, attention_mask=mask, past_key_values=loaded.cache(), **SHORT)
    assert output.shape == (1, 5)


def test_tokens_that_the_model_does_not_know_are_refused(context, tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    for token, says in ((260, "token 260 in a vocabulary of 260"), (2**31, "tokens: expected")):
        path = context.save(tmp_path / "c.sqz")
        with_manifest(path, lambda x, token=token: x["tokens"].__setitem__(5, token))
        with pytest.raises(ContextFileError, match=says):
            squeezed.generate(
                model, tokenizer, squeezed.load(path), "who?", repetition_penalty=1.3, **SHORT
            )


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_an_infinite_weight_is_an_edit_like_any_other(bad, context):
    model = copy.deepcopy(tiny_model())
    weight = model.model.layers[2].mlp.down_proj.weight  # no key comes after it
    with torch.no_grad():
        weight[3, 4] = bad
    with pytest.raises(ContextFileError, match=r"down_proj\.weight differs"):
        check_model(model, context)


def test_weights_beside_an_infinite_one_are_compared():
    one = copy.deepcopy(tiny_model())
    with torch.no_grad():
        one.model.layers[2].mlp.down_proj.weight[3, 4] = float("inf")
        made = model_fingerprint(one)
        assert difference(model_fingerprint(one, like=made), made) is None
        one.model.layers[2].mlp.down_proj.weight[5:40] += 1
    assert difference(model_fingerprint(one, like=made), made)
