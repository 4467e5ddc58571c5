"""A cache in other hands: used twice, copied, cropped, interrupted, full, with a wrong mask."""

import copy

import pytest
import torch
from tiny import document, tiny_model, tiny_tokenizer
from transformers import DynamicCache

import squeezed
from squeezed.context.prompt import PromptTemplate
from squeezed.errors import SqueezedError
from squeezed.hf import cache_layers as cache_module
from squeezed.hf.cache import suffix_mask
from squeezed.hf.switch import using_attention

CONFIG = squeezed.IndexConfig(
    clustering=squeezed.ClusteringConfig(levels=(0.05, 0.2), pinned_first=4, pinned_last=20),
    prefill_chunk=128,
)
FAMILIES = ["llama", "gemma3"]
KINDS = [None, 64]
GREEDY = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def context(model):
    return squeezed.index(model, tiny_tokenizer(), document(400), CONFIG, PromptTemplate.plain())


@pytest.fixture(params=KINDS)
def cache(context, request):
    return context.cache(0.3, implementation="reference", suffix_tokens=request.param)


def ids_of(*texts):
    found = tiny_tokenizer()(list(texts), return_tensors="pt", padding=True)["input_ids"]
    return torch.where(found == tiny_tokenizer().pad_token_id, 258, found)


def generate(model, cache, ids, mask=None, **arguments):
    """The README's plain form; `mask` is that of a new cache unless given."""
    if mask is None:
        mask = suffix_mask(len(cache.document), (ids != 258).long())
    with using_attention(model):
        return model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=cache, **(GREEDY | arguments)
        )


def forward(model, cache, ids, **arguments):
    with using_attention(model), torch.inference_mode():
        return model(input_ids=ids, past_key_values=cache, **arguments).logits


def held(cache):
    return int(cache.get_seq_length()) - len(cache.document)


@pytest.mark.parametrize("second", ["and beta?", "?", "a longer question, about alpha and gamma?"])
def test_second_request_over_a_used_cache_is_refused(model, cache, second):
    generate(model, cache, ids_of("what?"))
    with pytest.raises(SqueezedError, match=r"make a new cache") as refused:
        generate(model, cache, ids_of(second))
    assert "\n" not in str(refused.value)


def test_second_batch_over_a_used_cache_is_refused(model, cache):
    generate(model, cache, ids_of("what?", "who is it?"))
    with pytest.raises(SqueezedError, match="attention_mask"):
        generate(model, cache, ids_of("and?", "who was it?"))


def test_refused_request_leaves_the_cache_as_it_was(model, context, cache):
    first = generate(model, cache, ids_of("what?"))
    untouched = copy.deepcopy(cache)
    with pytest.raises(SqueezedError):
        generate(model, cache, ids_of("and beta?"))
    more = torch.cat([first[:, -1:], ids_of(" and beta?")], 1)
    outputs = []
    for each in (untouched, cache):
        mask = suffix_mask(each.get_seq_length(), torch.ones_like(more))
        outputs.append(generate(model, each, more, mask))
    assert outputs[0].equal(outputs[1])


def test_continuing_a_cache_equals_one_request_of_the_whole(model, context):
    cache = context.cache(1.0, implementation="reference")
    first, more = ids_of("what is it?"), ids_of(" and beta?")
    answer = generate(model, cache, first)
    tail = torch.cat([answer[:, -1:], more], 1)
    mask = suffix_mask(cache.get_seq_length(), torch.ones_like(tail))
    continued = generate(model, cache, tail, mask)[:, tail.shape[1] :]
    fresh, whole = context.cache(1.0, implementation="reference"), torch.cat([answer, more], 1)
    assert continued.equal(generate(model, fresh, whole)[:, whole.shape[1] :])


@pytest.mark.parametrize("mask", ["missing", "of the question", "too short"])
def test_wrong_mask_is_refused_in_generate(model, cache, mask):
    ids = ids_of("what?", "who is it, please?")
    tokens = {"missing": None, "of the question": 0, "too short": len(cache.document) - 3}[mask]
    given = None if tokens is None else suffix_mask(tokens, (ids != 258).long())
    with using_attention(model), pytest.raises(SqueezedError, match="suffix_mask") as refused:
        model.generate(input_ids=ids, attention_mask=given, past_key_values=cache, **GREEDY)
    assert "\n" not in str(refused.value)


def test_mask_of_other_requests_is_refused(model, cache):
    ids = ids_of("and alpha?")
    mask = suffix_mask(len(cache.document), torch.ones_like(ids)).expand(2, -1)
    with pytest.raises(SqueezedError, match="attention_mask: expected one row per request"):
        generate(model, cache, ids, mask)


def test_a_loss_reaches_the_weights_or_is_refused():
    model = copy.deepcopy(tiny_model())
    whole = squeezed.index(model, tiny_tokenizer(), document(400), CONFIG, PromptTemplate.plain())
    ids, gradients = ids_of("and alpha?"), []
    plain = DynamicCache()
    with torch.no_grad():
        model(whole.tokens[None], past_key_values=plain)
    for cache in (plain, whole.cache(1.0, implementation="reference")):
        model.zero_grad()
        with using_attention(model):
            model(ids, past_key_values=cache, labels=ids).loss.backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-5) and gradients[0].any()
    with using_attention(model):
        loss = model(ids, past_key_values=whole.cache(1.0), labels=ids).loss
    with pytest.raises(SqueezedError, match="backward: "):
        loss.backward()


@pytest.mark.parametrize("wrong", ["3", None, 1.5, True])
def test_cropping_by_what_is_no_number_is_refused(cache, wrong):
    with pytest.raises(SqueezedError, match="crop: expected a whole number"):
        cache.crop(wrong)


def test_mask_of_the_question_is_refused_in_forward(model, cache):
    ids = ids_of("what?", "who is it, please?")
    with pytest.raises(SqueezedError, match="suffix_mask"):
        forward(model, cache, ids, attention_mask=(ids != 258).long())


def test_whole_ids_with_prompt_lookup_are_refused_outside_of_squeezed_generate(model, context):
    cache = context.cache(1.0, implementation="reference")
    whole = torch.cat([context.tokens[None], ids_of("what?")], 1)
    with using_attention(model), pytest.raises(SqueezedError, match="positions"):
        model.generate(input_ids=whole, past_key_values=cache, prompt_lookup_num_tokens=3, **GREEDY)


def test_question_ids_with_prompt_lookup_equal_plain_decoding(model, context, cache):
    ids = ids_of("alpha beta gamma alpha beta")
    assert generate(model, cache, ids, prompt_lookup_num_tokens=3).equal(
        generate(model, context.cache(0.3, implementation="reference"), ids)
    )


def test_copies_share_the_context_and_nothing_else(model, cache):
    generate(model, cache, ids_of("what?"))
    for copied in (copy.deepcopy(cache), copy.copy(cache)):
        for one, other in zip(cache.layers, copied.layers, strict=True):
            assert one.context is other.context and one is not other
            assert one.keys is not other.keys and other.last is copied.layers[-1]
        before = held(copied)
        forward(model, cache, ids_of("xy"))
        assert held(copied) == before and held(cache) == before + 2
        cache.crop(-2)
        logits = [forward(model, each, ids_of("z")) for each in (cache, copied)]
        assert logits[0].equal(logits[1])
        cache.crop(-1)


def test_crop_and_reset_leave_no_trace(model, context, cache):
    expected = forward(model, cache, ids_of("what?"))
    forward(model, cache, ids_of(" is"))
    cache.crop(-held(cache))
    assert held(cache) == 0 and forward(model, cache, ids_of("what?")).equal(expected)
    cache.reset()
    assert held(cache) == 0 and forward(model, cache, ids_of("what?")).equal(expected)
    assert int(cache.context_layers[0].queries_answered) == len("what?")
    for count in (1, -6):
        with pytest.raises(SqueezedError, match="crop"):
            cache.crop(count)
    assert held(cache) == len("what?")


def test_rows_repeat_reorder_and_select(model, context, cache):
    forward(model, cache, ids_of("what?"))
    alone = [copy.deepcopy(cache) for _ in range(3)]
    cache.batch_repeat_interleave(3)
    forward(model, cache, ids_of("a", "b", "c"))
    for one, text in zip(alone, "abc", strict=True):
        forward(model, one, ids_of(text))
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.batch_select_indices(torch.tensor([0, 2]))
    logits = forward(model, cache, ids_of("x", "y"))
    for row, (one, text) in enumerate(((alone[2], "x"), (alone[0], "y"))):
        torch.testing.assert_close(logits[row], forward(model, one, ids_of(text))[0])


def test_another_number_of_requests_is_refused_while_the_cache_holds_some(model, cache):
    forward(model, cache, ids_of("what?"))
    with pytest.raises(SqueezedError, match="requests"):
        forward(model, cache, ids_of("a", "b"))
    cache.crop(-held(cache))
    forward(model, cache, ids_of("a", "b"))
    assert held(cache) == 1


def test_pass_interrupted_between_layers_leaves_no_trace(model, context, cache):
    forward(model, cache, ids_of("what?"))
    undisturbed = copy.deepcopy(cache)

    def stop(*_):
        raise KeyboardInterrupt

    for layer in range(1, 3):
        hook = model.model.layers[layer].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            forward(model, cache, ids_of(" lost"))
        hook.remove()
        assert held(cache) == held(undisturbed)
    logits = [forward(model, each, ids_of(" is")) for each in (cache, undisturbed)]
    assert logits[0].equal(logits[1]) and held(cache) == held(undisturbed)


def test_fixed_cache_says_when_it_is_full_before_it_overflows(model, context):
    cache = context.cache(0.3, implementation="reference", suffix_tokens=8)
    with pytest.raises(SqueezedError, match="suffix_tokens"):
        generate(model, cache, ids_of("what?"))
    assert held(cache) == 8
    cache.reset()
    exact = generate(model, cache, ids_of("what"))
    assert held(cache) == 8 and exact.shape[1] == 9
    for text in ("x", "xy"):
        with pytest.raises(SqueezedError, match="room for 8"):
            forward(model, cache, ids_of(text))
    grown = context.cache(0.3, implementation="reference")
    assert exact.equal(generate(model, grown, ids_of("what")))


def test_model_with_more_layers_than_the_cache_is_refused(context, model):
    if model.config.model_type == "llama":
        with pytest.raises(SqueezedError, match="layers"):
            forward(tiny_model("llama", num_hidden_layers=4), context.cache(0.3), ids_of("x"))


def test_rewind_keeps_what_is_alike_and_feeds_at_least_one_token(model, cache):
    ids = ids_of("what is it?")
    forward(model, cache, ids)
    cache.remember(ids[0])
    cache.rewind(ids_of("what was?")[0])
    assert held(cache) == len("what ") and len(cache.known) == held(cache)
    cache.rewind(ids_of("what ")[0])
    assert held(cache) == len("what")
    forward(model, cache, ids_of("!!"))  # not told
    cache.rewind(ids_of("what!!")[0])
    assert held(cache) == len("what")


def test_another_softmax_scale_than_the_contexts_is_refused(context):
    layer = context.cache(0.3, implementation="reference").context_layers[0]
    tree = layer.context.layer
    heads, _, dim = tree.keys.shape
    rows = torch.zeros(1, heads, 1, dim)
    layer.update(rows, rows)
    query = torch.zeros(1, 2 * heads, 1, dim)
    assert layer.answer(query, None, tree.scale).shape == query.shape
    with pytest.raises(SqueezedError, match="softmax scale"):
        layer.answer(query, None, 2 * tree.scale)


def places(mask, ids):
    return (mask.cumsum(1) - 1)[:, -ids.shape[1] :]


def test_padding_is_looked_up_once_for_all_layers_of_a_pass(model, cache, monkeypatch):
    looked = []

    def real_tokens(mask, requests, found=cache_module.real_tokens):
        looked.append(found(mask, requests))
        return looked[-1]

    monkeypatch.setattr(cache_module, "real_tokens", real_tokens)
    ids = ids_of("mu?", "what is alpha?")
    mask = suffix_mask(len(cache.document), (ids != 258).long())
    forward(model, cache, ids, attention_mask=mask, position_ids=places(mask, ids))
    assert len(looked) == 1
    assert looked[0].equal(ids != 258)
    mask, last = torch.cat([mask, torch.ones_like(mask[:, :1])], 1), ids[:, :1] * 0 + 5
    forward(model, cache, last, attention_mask=mask, position_ids=places(mask, last))
    assert len(looked) == 2 and looked[1].shape == (2, 1)
