"""States of a model: training mode, threads, autocast, compiled, weights that wait elsewhere."""

import threading
import types

import pytest
import torch
from test_shapes import QUESTION, build, divergence, indexed
from tiny import tiny_tokenizer

import squeezed
from squeezed.hf.switch import using_attention

NOISY = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attention_dropout": 0.3}


def keys(context):
    return [layer.keys for layer in context.layers]


def same(one, other):
    return all(a.equal(b) for a, b in zip(keys(one), keys(other), strict=True))


def ask(model, context, **arguments):
    arguments = {"max_new_tokens": 8, "budget": 0.3, "implementation": "cpu"} | arguments
    return squeezed.generate(model, tiny_tokenizer(), context, QUESTION, **arguments).tokens


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_mode_changes_neither_context_nor_answer_and_comes_back(checkpointing):
    model = build("Phi", **NOISY)
    context = indexed(model)
    expected = ask(model, context)
    model.train()
    model.model.layers[1].eval()  # frozen by its owner
    if checkpointing:
        model.gradient_checkpointing_enable()
    modes = [module.training for module in model.modules()]
    assert same(indexed(model), context)
    assert ask(model, context).equal(expected)
    assert [module.training for module in model.modules()] == modes


def streaming(on_token):
    return types.SimpleNamespace(put=lambda value: on_token(), end=lambda: None)


def in_thread(work, failures):
    def run():
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize("other", ["generate", "index"])
def test_a_thread_that_ends_first_leaves_the_model_to_the_other(other):
    model = build("Llama").train()
    before, context = model.config._attn_implementation, indexed(model)
    expected, failures = ask(model, context), []
    inside, ended = threading.Event(), threading.Event()

    def first():
        def wait():
            inside.set()
            assert ended.wait(60)

        assert ask(model, context, streamer=streaming(wait)).equal(expected)

    thread = in_thread(first, failures)
    assert inside.wait(60)
    if other == "generate":
        assert ask(model, context).equal(expected)
    else:
        assert same(indexed(model), context)
    assert model.config._attn_implementation == "squeezed" and not model.training
    ended.set()
    thread.join()
    assert not failures
    assert model.config._attn_implementation == before and model.training


def test_many_threads_answer_alike():
    model = build("Llama")
    context, failures, answers = indexed(model), [], []
    expected = ask(model, context)

    def work():
        for _ in range(3):
            answers.append(ask(model, context))

    threads = [in_thread(work, failures) for _ in range(8)]
    for thread in threads:
        thread.join()
    assert not failures and len(answers) == 24
    assert all(answer.equal(expected) for answer in answers)
    assert model.config._attn_implementation == "sdpa"


def test_blocks_nest_and_an_exception_restores():
    model = build("Llama")
    with pytest.raises(KeyError), using_attention(model):
        with using_attention(model, "eager"):
            assert model.config._attn_implementation == "eager"
        assert model.config._attn_implementation == "squeezed"
        with using_attention(model):
            raise KeyError
    assert model.config._attn_implementation == "sdpa"


def test_another_attention_waits_for_the_threads_at_work():
    model, order, failures = build("Llama"), [], []

    def eager():
        with using_attention(model, "eager"):
            order.append(model.config._attn_implementation)

    with using_attention(model):
        thread = in_thread(eager, failures)
        thread.join(0.2)
        order.append(model.config._attn_implementation)
    thread.join()
    assert order == ["squeezed", "eager"] and not failures
    assert model.config._attn_implementation == "sdpa"


def test_a_nested_other_attention_beside_another_thread_is_refused():
    model, failures = build("Llama"), []
    inside, ended = threading.Event(), threading.Event()

    def hold():
        with using_attention(model):
            inside.set()
            assert ended.wait(60)

    thread = in_thread(hold, failures)
    assert inside.wait(60)
    with using_attention(model):
        with pytest.raises(squeezed.SqueezedError, match="another thread"):
            using_attention(model, "eager").__enter__()
        assert model.config._attn_implementation == "squeezed"
    ended.set()
    thread.join()
    assert not failures and model.config._attn_implementation == "sdpa"


def test_an_implementation_that_does_not_exist_leaves_the_model_as_it_was():
    model = build("Llama").train()
    with pytest.raises(Exception), using_attention(model, "no such attention"):  # noqa: B017
        pass
    assert model.config._attn_implementation == "sdpa" and model.training


def test_every_part_of_a_model_gets_its_own_attention_back():
    model = build("Llama")
    model.config._attn_implementation_internal = "eager"
    indexed(model)
    assert model.config._attn_implementation == "eager"


WINDOWED = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 2}


@pytest.mark.parametrize("kind", ["Llama", "Gemma3Text"])
@pytest.mark.parametrize("where", ["index", "generate", "both"])
@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_autocast_equals_dense_under_autocast(kind, where, implementation):
    changes = WINDOWED | {"num_hidden_layers": 4} if kind == "Gemma3Text" else {}
    model = build(kind, initializer_range=0.1, **changes)
    with torch.autocast("cpu", torch.bfloat16, enabled=where != "generate"):
        context = indexed(model)
    assert context.clustered_layers[0].keys.dtype == (
        torch.float32 if where == "generate" else torch.bfloat16
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=where != "index"):
        for suffix_tokens in (None, 64):
            found = divergence(
                model, context, implementation=implementation, suffix_tokens=suffix_tokens
            )
            assert found < 2e-3


@pytest.mark.parametrize("where", ["index", "generate"])
def test_a_model_is_known_again_under_autocast_and_without(where):
    model = build("Llama", initializer_range=0.2)
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "index"):
        context = indexed(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "generate"):
        assert len(ask(model, context)) == 8
    other = build("Llama", initializer_range=0.21)
    with pytest.raises(squeezed.SqueezedError, match="another model"):
        ask(other, context)


def test_float64_weights_make_a_float32_context():
    model = build("Llama").double()
    context = indexed(model)
    assert context.clustered_layers[0].keys.dtype == torch.float32
    assert divergence(model, context, implementation="cpu") < 1e-7
