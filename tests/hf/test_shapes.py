"""Attention shapes of Transformers: what is supported equals dense, the rest is refused at once."""

from copy import deepcopy

import pytest
import torch
import transformers
from tiny import COMMON, document, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

import squeezed
from squeezed.context.prompt import PromptTemplate
from squeezed.hf.capture import capture
from squeezed.hf.support import layer_kinds
from squeezed.hf.switch import using_attention

CONFIG = squeezed.IndexConfig(
    squeezed.ClusteringConfig(levels=(0.05, 0.2), pinned_first=4, pinned_last=20), prefill_chunk=128
)
S, F = "sliding_attention", "full_attention"
QUESTION = "what is alpha? tell me"


def build(kind, **changes):
    """A tiny random model of any configuration class, by the name before `Config`."""
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**COMMON | deepcopy(changes))
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    return model


def indexed(model, text=None):
    return squeezed.index(
        model, tiny_tokenizer(), text or document(400), CONFIG, PromptTemplate.plain()
    )


def ids_of(text):
    return torch.tensor([tiny_tokenizer()(text)["input_ids"]])


def divergence(model, context, budget=1.0, implementation="reference", suffix_tokens=None):
    """KL from dense over a question's tokens and eight more, in nats, the largest one."""
    suffix = torch.cat([ids_of(QUESTION), ids_of(document(8, seed=5))], 1)
    whole = torch.cat([context.tokens[None], suffix], 1)
    cache = context.cache(budget, implementation=implementation, suffix_tokens=suffix_tokens)
    start, parts = len(context.tokens), [len(QUESTION), *[1] * 8]
    with torch.inference_mode():
        dense = model(input_ids=whole, use_cache=False).logits[:, start:].double().log_softmax(-1)
        with using_attention(model):
            logits = [
                model(input_ids=x, past_key_values=cache).logits for x in suffix.split(parts, 1)
            ]
    ours = torch.cat(logits, 1).double().log_softmax(-1)
    return float((dense.exp() * (dense - ours)).sum(-1).max())


SHARING = {
    "Gemma4Text": {"vocab_size_per_layer_input": 260, "hidden_size_per_layer_input": 16},
    "Gemma3nText": {
        "vocab_size_per_layer_input": 260,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": None,
    },
}


def sharing(kind, types, shared, **changes):
    changes = {"global_head_dim": 32} | changes if kind == "Gemma4Text" else changes
    model = build(
        kind,
        num_hidden_layers=len(types),
        layer_types=types,
        num_kv_shared_layers=shared,
        sliding_window=32,
        **SHARING[kind] | changes,
    )
    torch.manual_seed(1)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return model


@pytest.mark.transformers("5.23")
@pytest.mark.parametrize("kind", SHARING)
@pytest.mark.parametrize(
    ("types", "shared"), [([S, F, S, F, S, F], 2), ([F, F, S, F, F], 2), ([F, S, F, S, F, F], 4)]
)
def test_layers_that_share_keys_equal_dense(kind, types, shared):
    model = sharing(kind, types, shared)
    context = indexed(model)
    assert len(context.layers) == len(types) - shared
    assert divergence(model, context) < 1e-7
    assert divergence(model, context, implementation="cpu", suffix_tokens=64) < 1e-7
    assert divergence(model, context, budget=0.05) > 1e-6


@pytest.mark.transformers("5.23")
@pytest.mark.parametrize("kind", SHARING)
def test_generate_with_shared_keys_equals_dense_and_counts_every_reader(kind):
    model = sharing(kind, [S, F, S, F, F], 2)
    context = indexed(model)
    suffix = ids_of(QUESTION)
    whole = torch.cat([context.tokens[None], suffix], 1)
    dense = model.generate(whole, max_new_tokens=8, do_sample=False)[0, whole.shape[1] :]
    answer = squeezed.generate(
        model, tiny_tokenizer(), context, QUESTION, 1.0, implementation="cpu", max_new_tokens=8
    )
    assert answer.tokens.equal(dense) and answer.spending.budget == 1.0
    selectable = context.clustered_layers[0].clustered * COMMON["num_key_value_heads"]
    one_owner, three_readers = selectable, 3 * selectable
    assert one_owner < answer.spending.keys_read <= three_readers


@pytest.mark.transformers("5.23")
def test_queries_of_sharing_layers_calibrate_too():
    model = sharing("Gemma3nText", [S, F, S, F, F], 2)
    assert [kind.readers for kind in layer_kinds(model)] == [1, 3, 1]
    layers = capture(model, ids_of(document(100))[0], ids_of("what?")[0], 64)
    assert [x.queries is None for x in layers] == [True, False, True]
    assert layers[1].queries.shape == (4, 3 * len("what?"), 16)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Gpt2".upper(), {"n_embd": 64, "n_layer": 3, "n_head": 4}),
        ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0}),
        ("Bert", {"is_decoder": True}),
        ("Phi", {}),
        ("GPTNeoX", {"hidden_act": "gelu"}),
        ("Afmoe", {"num_experts": 4, "num_dense_layers": 1, "moe_intermediate_size": 32,
                   "num_experts_per_tok": 2, "sliding_window": 32, "layer_types": [S, F, F]}),
        ("Phi3", {"sliding_window": 1 << 18, "pad_token_id": None}),
    ],
)  # fmt: skip
def test_other_shapes_equal_dense(kind, changes):
    model = build(kind, **changes)
    assert divergence(model, indexed(model), implementation="cpu") < 1e-7


LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
          "v_head_dim": 8}  # fmt: skip
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
          "n_group": 1, "topk_group": 1}  # fmt: skip
REFUSED = {
    "Bert": ({}, "."),
    "Electra": ({}, "."),
    "Ernie": ({}, "."),
    "RoCBert": ({}, "."),
    "MiniCPM3": (LATENT, "between cache and attention"),
    "Glm4MoeLite": (LATENT | ROUTED, "."),
    "LongcatFlash": (
        LATENT | {"num_layers": 2, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32,
                  "n_routed_experts": 4, "moe_topk": 2, "zero_expert_num": 1}, "."),
    "DiffLlama": ({}, "."),
    "JetMoe": ({"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16}, "."),
    "Doge": ({}, "."),
    "MiMoV2Flash": (
        {"v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32,
         "moe_intermediate_size": 32, "layer_types": [F, S, F]}, "."),
    "Gemma2": ({}, "soft-capped"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_other_attention_is_refused_in_one_line_before_the_document_is_read(kind, monkeypatch):
    changes, reason = REFUSED[kind]
    model = build(kind, **changes)
    monkeypatch.setattr("squeezed.engine.capture", lambda *_: pytest.fail("the document was read"))
    with pytest.raises(squeezed.UnsupportedModelError, match=reason) as refusal:
        indexed(model)
    assert "\n" not in str(refusal.value) and "use a " in str(refusal.value)


def test_masks_and_arguments_of_a_models_own_are_refused():
    model = tiny_model()
    attention = model.model.layers[1].self_attn
    attention.is_causal = False
    try:
        with pytest.raises(squeezed.UnsupportedModelError, match="later tokens"):
            indexed(model)
    finally:
        attention.is_causal = True
    indexed(model)
