"""Pieces of a prompt have the ids that the whole prompt has."""

import pytest
import torch
import transformers
from tiny import tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from squeezed.answers.chat import Turn, conversation_ids
from squeezed.context.prompt import PromptTemplate, continued_ids

TEXT = "the pump runs. how fast? it runs at 1,450 rpm.\n\nthe pump [inst] [/inst] has a fan."
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[inst]{{ m.content }}[/inst]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def sentencepiece(scheme, trained=True, fallback=False):
    """A tokenizer of the Llama 2 kind: a word mark before a text, or before every piece of it."""
    backend = Tokenizer(models.BPE(byte_fallback=fallback, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    alphabet = sorted({*TEXT, "\u2581"})
    size = 90 if trained else 0
    special = [AddedToken("<unk>"), AddedToken("<s>"), AddedToken("</s>")]
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(TEXT.splitlines() * 3, trainer)  # no token crosses a line's end
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_document_and_question_of_a_sentencepiece_tokenizer_are_the_whole_prompt(scheme, trained):
    tokenizer = sentencepiece(scheme, trained)
    template = PromptTemplate.of(tokenizer)
    document, question = "the pump runs.", "how fast?"
    pieces = (
        template.document_ids(tokenizer, document),
        template.question_ids(tokenizer, question),
    )
    message = {"role": "user", "content": f"{document}\n\n{question}"}
    whole = tokenizer.apply_chat_template([message], return_dict=False)
    assert torch.cat(pieces).tolist() == whole


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_turns_of_a_sentencepiece_tokenizer_are_the_whole_conversation(scheme):
    tokenizer = sentencepiece(scheme)
    template = PromptTemplate.of(tokenizer)
    answer = continued_ids(tokenizer, "it runs.")
    found = conversation_ids(tokenizer, template, [Turn("how fast?", answer)], "a fan?")
    messages = [
        {"role": "user", "content": "the pump.\n\nhow fast?"},
        {"role": "assistant", "content": tokenizer.decode(answer)},
        {"role": "user", "content": "a fan?"},
    ]
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    assert [*template.document_ids(tokenizer, "the pump.").tolist(), *found.tolist()] == whole


@pytest.mark.parametrize("text", ["how fast?", " how", "\n\nhow", "a", "0", "."])
def test_continued_ids_hold_no_word_mark_that_the_text_has_not(text):
    tokenizer = sentencepiece("first")
    ids = continued_ids(tokenizer, text)
    assert "".join(tokenizer.convert_ids_to_tokens(ids)).replace("\u2581", " ") == text


@pytest.mark.parametrize("text", ["how fast?", " how", "\n\nhow", "", "a", "\u00e4h"])
def test_continued_ids_of_a_byte_tokenizer_are_its_own(text):
    assert continued_ids(tiny_tokenizer(), text).tolist() == tiny_tokenizer()(text)["input_ids"]


def test_a_template_is_the_chats_only_if_it_writes_what_the_chat_template_writes():
    tokenizer = sentencepiece("first")
    own = PromptTemplate.of(tokenizer)
    assert own.is_chat_of(tokenizer)
    assert PromptTemplate("Today. ", own.between, own.after).is_chat_of(tokenizer)
    assert not PromptTemplate.plain().is_chat_of(tokenizer)
    assert not own.is_chat_of(tiny_tokenizer())
    tokenizer.chat_template = "{{ raise_exception('only tools') }}"
    assert not own.is_chat_of(tokenizer)
