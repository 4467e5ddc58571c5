"""Squeezed attention inside Transformers' own generate(), on every supported family."""

import pytest
import torch
import transformers
from tiny import FAMILIES, document, tiny_model, tiny_tokenizer
from transformers import DynamicCache

import squeezed
from squeezed.context.prompt import PromptTemplate
from squeezed.hf.cache import suffix_mask
from squeezed.hf.capture import capture
from squeezed.hf.switch import using_attention

CLUSTERING = squeezed.ClusteringConfig(levels=(0.05, 0.2), pinned_first=4, pinned_last=20)
CONFIG = squeezed.IndexConfig(clustering=CLUSTERING, prefill_chunk=128)
IMPLEMENTATIONS = ["reference", "cpu"]


def indexed(model, text=None):
    return squeezed.index(
        model, tiny_tokenizer(), text or document(), CONFIG, PromptTemplate.plain()
    )


def ids_of(text):
    return torch.tensor([tiny_tokenizer()(text)["input_ids"]])


def dense_generate(model, context, suffix, **arguments):
    """What the unpatched model generates after document + suffix."""
    full = torch.cat([context.tokens.expand(suffix.shape[0], -1), suffix], 1)
    mask = suffix_mask(len(context.tokens), (suffix != 258).long())
    with using_attention(model, "eager"):
        output = model.generate(input_ids=full, attention_mask=mask, **arguments)
    return output[:, full.shape[1] :]


def squeezed_generate(model, context, suffix, budget=1.0, implementation="reference", **arguments):
    cache = context.cache(budget, implementation=implementation)
    mask = suffix_mask(len(context.tokens), (suffix != 258).long())
    with using_attention(model):
        output = model.generate(
            input_ids=suffix, attention_mask=mask, past_key_values=cache, **arguments
        )
    return output[:, suffix.shape[1] :]


GREEDY = {"max_new_tokens": 12, "do_sample": False}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_at_full_budget_equals_dense(family, implementation):
    model = tiny_model(family)
    context = indexed(model)
    suffix = ids_of("what is alpha?")
    squeezed_tokens = squeezed_generate(
        model, context, suffix, implementation=implementation, **GREEDY
    )
    assert squeezed_tokens.equal(dense_generate(model, context, suffix, **GREEDY))


def test_generate_at_small_budget_differs_from_dense_and_reads_less():
    model = tiny_model()
    context = indexed(model)
    suffix = ids_of("what is alpha?")
    logits = []
    for budget in (1.0, 0.05):
        cache = context.cache(budget, implementation="reference")
        with using_attention(model), torch.inference_mode():
            logits.append(model(input_ids=suffix, past_key_values=cache).logits)
        assert (cache.spending().budget < 0.3) == (budget < 1.0)
    assert not torch.allclose(*logits, atol=1e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("budget", [1.0, 0.1])
def test_left_padded_batch_equals_single_requests(family, implementation, budget):
    model = tiny_model(family)
    context = indexed(model)
    questions = ["what?", "what is the alpha of beta?", "who is gamma"]
    batch = tiny_tokenizer()(questions, return_tensors="pt", padding=True)["input_ids"]
    batch[batch == tiny_tokenizer().pad_token_id] = 258
    together = squeezed_generate(model, context, batch, budget, implementation, **GREEDY)
    for row, question in zip(together, questions, strict=True):
        alone = squeezed_generate(
            model, context, ids_of(question), budget, implementation, **GREEDY
        )
        assert row.equal(alone[0])


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_beam_search_at_full_budget_equals_dense(family):
    model = tiny_model(family)
    context = indexed(model)
    suffix = ids_of("beams of theta")
    arguments = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    assert squeezed_generate(model, context, suffix, **arguments).equal(
        dense_generate(model, context, suffix, **arguments)
    )


def test_sampling_with_a_seed_equals_dense():
    model = tiny_model("qwen2")
    context = indexed(model)
    suffix = ids_of("sample me")
    arguments = {"max_new_tokens": 10, "do_sample": True, "temperature": 0.7}
    torch.manual_seed(3)
    first = squeezed_generate(model, context, suffix, **arguments)
    torch.manual_seed(3)
    assert first.equal(dense_generate(model, context, suffix, **arguments))


def test_two_contexts_stay_apart():
    model = tiny_model()
    contexts = [indexed(model, document(seed=seed)) for seed in (1, 2)]
    suffix = ids_of("which one?")
    caches = [context.cache(0.2, implementation="reference") for context in contexts]
    alone = [squeezed_generate(model, context, suffix, 0.2, **GREEDY) for context in contexts]
    tokens = [suffix, suffix]
    with using_attention(model), torch.inference_mode():
        for _ in range(GREEDY["max_new_tokens"]):  # alternate, token by token
            for i, cache in enumerate(caches):
                new = tokens[i] if cache.layers[0].suffix_length == 0 else tokens[i][:, -1:]
                logits = model(input_ids=new, past_key_values=cache).logits
                tokens[i] = torch.cat([tokens[i], logits[:, -1:].argmax(-1)], 1)
    for expected, got in zip(alone, tokens, strict=True):
        assert got[:, suffix.shape[1] :].equal(expected)


def test_full_input_ids_are_accepted_too():
    model = tiny_model()
    context = indexed(model)
    suffix = ids_of("all of it")
    full = torch.cat([context.tokens[None], suffix], 1)
    with using_attention(model):
        output = model.generate(
            input_ids=full, past_key_values=context.cache(1.0, implementation="reference"), **GREEDY
        )
    assert output[:, full.shape[1] :].equal(dense_generate(model, context, suffix, **GREEDY))


def test_prefill_chunk_does_not_change_the_context():
    model = tiny_model("gemma3")
    text = document()
    one, many = (
        squeezed.index(
            model,
            tiny_tokenizer(),
            text,
            squeezed.IndexConfig(clustering=CLUSTERING, prefill_chunk=chunk),
            PromptTemplate.plain(),
        )
        for chunk in (4096, 50)
    )
    for a, b in zip(one.layers, many.layers, strict=True):
        order = [getattr(x, "positions", None) for x in (a, b)]
        if order[0] is None:
            torch.testing.assert_close(a.keys, b.keys, atol=1e-4, rtol=1e-4)
            continue
        by_position = [
            x.keys.gather(1, x.positions.long().argsort(1)[..., None].expand_as(x.keys))
            for x in (a, b)
        ]
        torch.testing.assert_close(*by_position, atol=1e-4, rtol=1e-4)


def test_attention_implementation_is_restored():
    model = tiny_model()
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError), using_attention(model):
        assert model.config._attn_implementation == "squeezed"
        raise RuntimeError
    assert model.config._attn_implementation == before
    indexed(model)
    assert model.config._attn_implementation == before


def test_squeezed_attention_with_an_ordinary_cache_equals_sdpa():
    model = tiny_model("mistral")
    ids = ids_of(document(100))
    outputs = []
    for name in ("squeezed", "sdpa"):
        with using_attention(model, name), torch.inference_mode():
            outputs.append(model(input_ids=ids, past_key_values=DynamicCache()).logits)
    assert outputs[0].equal(outputs[1])


def test_squeezed_cache_under_another_attention_names_the_remedy():
    model = tiny_model()
    context = indexed(model)
    with (
        using_attention(model, "sdpa"),
        pytest.raises(squeezed.SqueezedError, match="set_attn_implementation"),
    ):
        model(input_ids=ids_of("x"), past_key_values=context.cache())


def test_unsupported_models_are_refused_with_the_reason():
    config = transformers.Gemma2Config(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    gemma2 = transformers.Gemma2ForCausalLM(config)
    with pytest.raises(squeezed.UnsupportedModelError, match="soft-capped"):
        indexed(gemma2)
    with pytest.raises(squeezed.UnsupportedModelError, match="slides"):
        indexed(tiny_model("mistral", sliding_window=16))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("budget", [1.0, 0.1])
def test_static_suffix_equals_growing_suffix(family, budget):
    model = tiny_model(family)
    context = indexed(model)
    questions = ["what?", "what is the alpha of beta?"]
    batch = tiny_tokenizer()(questions, return_tensors="pt", padding=True)["input_ids"]
    batch[batch == tiny_tokenizer().pad_token_id] = 258
    mask = suffix_mask(len(context.tokens), (batch != 258).long())
    outputs, spent = [], []
    for suffix_tokens in (None, 64):
        cache = context.cache(budget, implementation="reference", suffix_tokens=suffix_tokens)
        with using_attention(model):
            outputs.append(
                model.generate(
                    input_ids=batch, attention_mask=mask, past_key_values=cache, **GREEDY
                )
            )
        spent.append(cache.spending())
    assert outputs[0].equal(outputs[1]) and spent[0] == spent[1]


def test_static_suffix_without_a_mask_sees_no_empty_slot():
    model = tiny_model()
    context = indexed(model)
    logits = []
    for suffix_tokens in (None, 64):
        cache = context.cache(1.0, implementation="reference", suffix_tokens=suffix_tokens)
        with using_attention(model), torch.inference_mode():
            model(input_ids=ids_of("first part"), past_key_values=cache)
            logits.append(model(input_ids=ids_of("x"), past_key_values=cache).logits)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def test_input_longer_than_the_static_suffix_is_refused():
    model = tiny_model()
    cache = indexed(model).cache(1.0, suffix_tokens=4)
    with using_attention(model), pytest.raises(squeezed.SqueezedError, match="suffix_tokens"):
        model(input_ids=ids_of("too long a question"), past_key_values=cache)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_probe_leaves_no_trace_in_the_context(family):
    model = tiny_model(family)
    tokens = ids_of(document(300))[0]
    kept = [
        capture(model, tokens, ids_of(probe)[0], chunk=64)
        for probe in ("what?", "who is beta, then?")
    ]
    for one, other in zip(*kept, strict=True):
        assert one.keys.equal(other.keys) and one.values.equal(other.values)
        assert (one.queries is None) == (other.queries is None)
        if one.queries is not None:
            assert one.keys.shape[1] == 300 and one.queries.shape[1] == len("what?")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_a_mask_of_four_dimensions_is_refused(dtype):
    model = tiny_model("llama")
    context, ids = indexed(model), ids_of("what is mu?")
    mask = torch.zeros(1, 1, ids.shape[1], len(context.tokens) + ids.shape[1], dtype=dtype)
    with using_attention(model), pytest.raises(squeezed.SqueezedError, match="attention_mask"):
        model(ids, attention_mask=mask, past_key_values=context.cache(1.0))
