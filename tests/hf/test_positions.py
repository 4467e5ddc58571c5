"""Positions that end, and rotary frequencies that change with the length: right or refused."""

import logging

import pytest
import torch
from test_shapes import QUESTION, build, divergence, indexed
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.hf.cache import suffix_mask
from squeezed.hf.positions import check_document
from squeezed.hf.switch import using_attention

SWITCH = 512
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "long_factor": [8.0] * 8,
    "short_factor": [1.0] * 8,
    "original_max_position_embeddings": SWITCH,
}
MODELS = {
    "Phi3": {
        "rope_parameters": LONGROPE,
        "original_max_position_embeddings": SWITCH,
        "pad_token_id": None,
    },
    "Llama": {"rope_parameters": LONGROPE},
    "Phimoe": {
        "rope_parameters": LONGROPE | {"short_mscale": 1.0, "long_mscale": 1.2},
        "num_local_experts": 2,
        "sliding_window": None,
    },
    "Gemma3Text": {
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "sliding_window": 32,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": LONGROPE,
        },
    },
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.transformers("5.23")
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("length", [400, SWITCH + 1, 900])
def test_longrope_equals_dense_on_both_sides_of_its_switch(kind, length):
    model = build(kind, **MODELS[kind])
    assert divergence(model, indexed(model, document(length))) < 1e-7


def test_frequencies_that_the_model_used_last_do_not_matter():
    model = build("Llama", **MODELS["Llama"])
    contexts = {length: indexed(model, document(length)) for length in (400, 900)}
    for length in (900, 400, 900):
        assert divergence(model, contexts[length]) < 1e-7


@pytest.mark.parametrize("kind", ["Phi3", "Gemma3Text"])
def test_questions_over_the_switch_are_refused_before_they_are_read(kind):
    model = build(kind, **MODELS[kind])
    context = indexed(model, document(480))
    with pytest.raises(squeezed.SqueezedError, match="at most 11"):
        squeezed.generate(model, tiny_tokenizer(), context, QUESTION, max_new_tokens=12)
    squeezed.generate(model, tiny_tokenizer(), context, QUESTION, max_new_tokens=11)
    with pytest.raises(squeezed.SqueezedError, match="shorten the question"):
        squeezed.generate(model, tiny_tokenizer(), context, QUESTION * 2, max_new_tokens=1)
    with pytest.raises(squeezed.SqueezedError, match="no room for a question"):
        indexed(model, document(SWITCH - 2))


@pytest.mark.parametrize("suffix_tokens", [None, 64])
def test_transformers_own_generate_is_refused_at_the_switch_too(suffix_tokens):
    model = build("Llama", **MODELS["Llama"])
    context = indexed(model, document(480))
    ids = torch.tensor([tiny_tokenizer()(QUESTION)["input_ids"]])
    mask = suffix_mask(len(context.tokens), torch.ones_like(ids))
    cache = context.cache(1.0, implementation="reference", suffix_tokens=suffix_tokens)
    with using_attention(model), pytest.raises(squeezed.SqueezedError, match="frequencies change"):
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=20)


@pytest.mark.parametrize("nested", [False, True])
def test_dynamic_frequencies_equal_dense_until_they_move(nested):
    if nested:
        plain = {"rope_type": "default", "rope_theta": 1e4}
        ropes = {"sliding_attention": plain, "full_attention": DYNAMIC}
        changes = MODELS["Gemma3Text"] | {"rope_parameters": ropes}
        model = build("Gemma3Text", max_position_embeddings=SWITCH, **changes)
    else:
        model = build("Llama", max_position_embeddings=SWITCH, rope_parameters=DYNAMIC)
    context = indexed(model, document(400))
    model(input_ids=torch.zeros(1, SWITCH + 40, dtype=torch.long))  # frequencies have moved
    assert divergence(model, context) < 1e-7
    with pytest.raises(squeezed.SqueezedError, match="frequencies change"):
        squeezed.generate(model, tiny_tokenizer(), context, QUESTION, max_new_tokens=200)
    with pytest.raises(squeezed.SqueezedError, match="shorten the document"):
        indexed(model, document(SWITCH + 100))


LEARNED = {
    "GPT2": {"n_embd": 64, "n_layer": 3, "n_head": 4},
    "OPT": {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0},
    "Bert": {"is_decoder": True},
    "Roberta": {"is_decoder": True, "pad_token_id": 1},
}


@pytest.mark.parametrize("kind", LEARNED)
def test_learned_positions_are_used_to_the_last_and_never_passed(kind):
    model = build(kind, max_position_embeddings=256, **LEARNED[kind])
    last = 256 - 2 if kind == "Roberta" else 256  # which counts from its padding on
    room = check_document(model, 200)
    assert room == last - 200
    for length in (last - 130, last - 40, last - 16):
        context = indexed(model, document(length))
        fitting = last - length - 15 + 1
        answer = squeezed.generate(
            model, tiny_tokenizer(), context, "what is alpha??", max_new_tokens=min(fitting, 20)
        )
        assert len(answer.tokens) == min(fitting, 20)
        with pytest.raises(squeezed.SqueezedError, match=f"at most {fitting}\\b"):
            squeezed.generate(
                model, tiny_tokenizer(), context, "what is alpha??", max_new_tokens=fitting + 1
            )
    with pytest.raises(squeezed.SqueezedError, match="no room for a question"):
        indexed(model, document(last - 3))
    with pytest.raises(squeezed.SqueezedError, match="positions end"):
        indexed(model, document(400))


def test_answers_beyond_trained_rotary_positions_are_noted(caplog):
    model = tiny_model(max_position_embeddings=300)
    context = indexed(model, document(270))
    with caplog.at_level(logging.WARNING, "squeezed"):
        squeezed.generate(model, tiny_tokenizer(), context, "what?", max_new_tokens=20)
        assert not caplog.records
        squeezed.generate(model, tiny_tokenizer(), context, "what?", max_new_tokens=40)
    assert "314 tokens" in caplog.text and "300 positions" in caplog.text
