"""A conversation over one context: every turn continues the same cache."""

import pytest
import torch
import transformers
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.chat import Chat, turn_template
from squeezed.errors import ContextFileError
from squeezed.prompt import PromptTemplate

QUESTIONS = ("What is alpha?", "And beta?", "And gamma?")


@pytest.fixture(scope="module")
def context():
    return squeezed.index(tiny_model("llama"), tiny_tokenizer(), document(700))


def talk(context, budget, tokens=6):
    cache = context.cache(budget, implementation="reference")
    return Chat(tiny_model("llama"), tiny_tokenizer(), context, cache)


def test_chat_of_everything_kept_equals_plain_generation_of_the_whole_text(context):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    chat, history = talk(context, 1.0), context.tokens
    for number, question in enumerate(QUESTIONS):
        answer = chat.ask(question, max_new_tokens=6)
        template = context.template
        asked = tokenizer(template.between + question + template.after, add_special_tokens=False)
        history = torch.cat([history, torch.tensor(asked["input_ids"])])
        whole = model.generate(history[None], max_new_tokens=6, do_sample=False)[0, len(history) :]
        assert answer.tokens.equal(whole), number
        history = torch.cat([history, whole])


def test_chat_cache_holds_every_token_once(context):
    chat, tokens = talk(context, 0.2), len(context.tokens)
    for question in QUESTIONS:
        answer = chat.ask(question, max_new_tokens=6)
        asked = context.template.question_ids(tiny_tokenizer(), question)
        tokens += len(asked) + len(answer.tokens)
    assert chat.cache.get_seq_length() == tokens - 1  # the last token was never fed back


def test_chat_drops_the_end_token_that_the_next_turn_writes_itself(context, monkeypatch):
    chat = talk(context, 1.0)
    first = chat.ask(QUESTIONS[0], max_new_tokens=6)
    monkeypatch.setattr(chat.model.generation_config, "eos_token_id", int(first.tokens[2]))
    other = talk(context, 1.0)
    other.ask(QUESTIONS[0], max_new_tokens=6)
    assert len(other.pending) == 0 and len(chat.pending) == 1


def test_chat_counts_spending_per_turn(context):
    chat = talk(context, 0.2)
    for question in QUESTIONS[:2]:
        pending = 0 if chat.pending is None else len(chat.pending)
        asked = len(context.template.question_ids(tiny_tokenizer(), question))
        answer = chat.ask(question, max_new_tokens=6)
        assert 0 < answer.spending.budget < 1
        answered = int(chat.cache.context_layers[0].queries_answered)
        assert answered == pending + asked + 6 - 1  # the last token was never fed back


def test_turn_template_follows_the_chat_template():
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="</s>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}<assistant>"
    )
    template = PromptTemplate.of(tokenizer)
    assert turn_template(tokenizer, template) == ("</s><user>", "</s><assistant>")
    plain = PromptTemplate.of(tiny_tokenizer())
    assert turn_template(tiny_tokenizer(), plain) == (plain.between, plain.after)


def test_chat_with_another_tokenizer_is_refused(context):
    other = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer
    )
    other.add_tokens(["zeta"])
    with pytest.raises(ContextFileError, match="tokenizer"):
        Chat(tiny_model("llama"), other, context, context.cache(0.2))
