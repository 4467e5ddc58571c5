"""A conversation over one context: every turn continues the same cache."""

import pytest
import torch
import transformers
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.answers.chat import Chat, turn_template
from squeezed.context.prompt import PromptTemplate
from squeezed.errors import ContextFileError

QUESTIONS = ("What is alpha?", "And beta?", "And gamma?")


@pytest.fixture(scope="module")
def context():
    return squeezed.index(tiny_model("llama"), tiny_tokenizer(), document(700))


def talk(context, budget, suffix_tokens=None):
    cache = context.cache(budget, implementation="reference", suffix_tokens=suffix_tokens)
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
    end = int(first.tokens[2])
    place = first.tokens.tolist().index(end)
    given, owned = talk(context, 1.0), talk(context, 1.0)
    given.ask(QUESTIONS[0], max_new_tokens=6, eos_token_id=end)
    monkeypatch.setattr(chat.model.generation_config, "eos_token_id", [end, 259])
    owned.ask(QUESTIONS[0], max_new_tokens=6)
    assert chat.turns[0].answer.equal(first.tokens)
    for other in (given, owned):
        assert other.turns[0].answer.equal(first.tokens[:place])
    answers = [x.ask(QUESTIONS[1], max_new_tokens=6).tokens for x in (given, owned)]
    assert answers[0].equal(answers[1])


def test_chat_counts_spending_per_turn(context):
    chat = talk(context, 0.2)
    for question, pending in zip(QUESTIONS[:2], (0, 1), strict=True):
        asked = len(context.template.question_ids(tiny_tokenizer(), question))
        answer = chat.ask(question, max_new_tokens=6)
        assert 0 < answer.spending.budget < 1
        answered = int(chat.cache.context_layers[0].queries_answered)
        assert answered == pending + asked + 6 - 1  # the last token was never fed back


class Leaves(transformers.generation.streamers.BaseStreamer):
    """A reader that leaves after some tokens."""

    def __init__(self, tokens, error):
        self.left, self.error = tokens, error

    def put(self, value):
        self.left -= 1
        if self.left < 0:
            raise self.error

    def end(self):
        pass


def interrupted_by_reader(chat, question):
    for tokens in (0, 1, 4):
        with pytest.raises(BrokenPipeError):
            chat.ask(question, max_new_tokens=6, streamer=Leaves(tokens, BrokenPipeError()))


def interrupted_between_layers(chat, question):
    def stop(*_):
        calls.append(0)
        if len(calls) > 2:
            raise KeyboardInterrupt

    for layer in range(3):
        calls = []
        hook = chat.model.model.layers[layer].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            chat.ask(question, max_new_tokens=6)
        hook.remove()


def refused(chat, question):
    with pytest.raises(squeezed.SqueezedError):
        chat.ask(question, max_new_tokens=6, use_cache=False)
    with pytest.raises(squeezed.SqueezedError):
        chat.ask(question, max_new_tokenz=6)


def asked_within_its_own_answer(chat, question):
    class Asks(Leaves):
        def put(self, value):
            chat.ask("And this meanwhile?", max_new_tokens=2)

    with pytest.raises(squeezed.SqueezedError, match="while its own answer is made"):
        chat.ask(question, max_new_tokens=6, streamer=Asks(0, None))


@pytest.mark.parametrize("suffix_tokens", [None, 256])
@pytest.mark.parametrize(
    "trouble",
    [interrupted_by_reader, interrupted_between_layers, refused, asked_within_its_own_answer],
)
def test_chat_after_trouble_equals_an_undisturbed_one(context, trouble, suffix_tokens):
    calm, troubled = talk(context, 0.2, suffix_tokens), talk(context, 0.2, suffix_tokens)
    for question in QUESTIONS:
        trouble(troubled, "And then something else?")
        trouble(troubled, question)
        answers = [chat.ask(question, max_new_tokens=6) for chat in (calm, troubled)]
        assert answers[0].tokens.equal(answers[1].tokens)
        assert answers[0].spending == answers[1].spending
    assert int(calm.cache.get_seq_length()) == int(troubled.cache.get_seq_length())


@pytest.mark.parametrize("suffix_tokens", [None, 256])
@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
    ],
)
def test_chat_goes_on_from_the_first_of_several_sequences(context, arguments, suffix_tokens):
    model, chat = tiny_model("llama"), talk(context, 1.0, suffix_tokens)
    history = context.tokens
    for turn, more in enumerate(({}, arguments, {"num_beams": 2}, {})):
        torch.manual_seed(turn)  # what is sampled may end in a tie, which rounding decides
        answer = chat.ask(QUESTIONS[turn % 3], max_new_tokens=5, **more)
        asked = context.template.question_ids(tiny_tokenizer(), QUESTIONS[turn % 3])
        history = torch.cat([history, asked])
        if not more.get("do_sample"):
            whole = model.generate(history[None], max_new_tokens=5, do_sample=False, **more)
            assert answer.sequences.equal(whole[:, len(history) :]), turn
        history = torch.cat([history, answer.sequences[0]])


def test_chats_that_share_a_cache_do_not_disturb_each_other(context):
    alone = [talk(context, 0.2) for _ in range(2)]
    shared = [talk(context, 0.2) for _ in range(2)]
    shared[1].cache = shared[0].cache
    for question in QUESTIONS:
        for one, other in zip(alone, shared, strict=True):
            expected = one.ask(question, max_new_tokens=6, repetition_penalty=1.2)
            found = other.ask(question, max_new_tokens=6, repetition_penalty=1.2)
            assert found.tokens.equal(expected.tokens)
        question += "!"


def test_chat_with_the_cache_of_another_context_is_refused(context):
    other = squeezed.index(tiny_model("llama"), tiny_tokenizer(), document(300, seed=1))
    with pytest.raises(squeezed.SqueezedError, match="cache"):
        Chat(tiny_model("llama"), tiny_tokenizer(), context, other.cache(0.2))


def test_chat_with_a_penalty_sees_document_and_earlier_turns(context):
    model, chat, history = tiny_model("llama"), talk(context, 1.0), context.tokens
    for question in QUESTIONS:
        answer = chat.ask(question, max_new_tokens=6, no_repeat_ngram_size=2)
        asked = context.template.question_ids(tiny_tokenizer(), question)
        history = torch.cat([history, asked])
        whole = model.generate(
            history[None], max_new_tokens=6, do_sample=False, no_repeat_ngram_size=2
        )
        assert answer.tokens.equal(whole[0, len(history) :])
        history = torch.cat([history, answer.tokens])


CHAT_TEMPLATES = {
    "keeps all": "<{{ m.role }}>{{ m.content }}</s>",
    "drops thoughts": "<{{ m.role }}>{{ m.content.split('g')[-1] if m.role == 'assistant' "
    "else m.content }}</s>",
    "trims": "<{{ m.role }}>{{ m.content | trim }}</s>\n",
    "drops answers before the last": "{% if m.role == 'user' or loop.index >= loop.length - 1 %}"
    "<{{ m.role }}>{{ m.content }}</s>{% endif %}",
}


def with_chat_template(body):
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="</s>"
    )
    tokenizer.chat_template = (
        f"{{% for m in messages %}}{body}{{% endfor %}}"
        "{% if add_generation_prompt %}<assistant><think></think>{% endif %}"
    )
    return tokenizer


LETTERS = {"suppress_tokens": [i for i in range(260) if not 64 <= i < 90], "max_new_tokens": 8}


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_chat_of_everything_kept_equals_dense_on_the_rendered_conversation(name):
    model, tokenizer = tiny_model("llama"), with_chat_template(CHAT_TEMPLATES[name])
    text = document(500)
    context = squeezed.index(model, tokenizer, text)
    chat = Chat(model, tokenizer, context, context.cache(1.0, implementation="reference"))
    messages = []
    for number, question in enumerate(QUESTIONS):
        with pytest.raises(BrokenPipeError):
            chat.ask("No.", streamer=Leaves(3, BrokenPipeError()), **LETTERS)
        answer = chat.ask(question, **LETTERS)
        content = question if messages else f"{text}\n\n{question}"
        messages.append({"role": "user", "content": content})
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        ids = torch.tensor([tokenizer(rendered)["input_ids"]])
        whole = model.generate(ids, do_sample=False, **LETTERS)[0, ids.shape[1] :]
        assert answer.tokens.equal(whole), number
        messages.append({"role": "assistant", "content": tokenizer.decode(answer.tokens)})


def test_chat_template_that_changes_what_stands_before_the_document_is_refused():
    tokenizer = with_chat_template(
        "{% if loop.first %}{{ messages | length }}{% endif %}{{ m.content }}"
    )
    context = squeezed.index(tiny_model("llama"), tokenizer, document(300))
    cache = context.cache(1.0, implementation="reference")
    chat = Chat(tiny_model("llama"), tokenizer, context, cache)
    chat.ask("one?", max_new_tokens=2)
    with pytest.raises(squeezed.SqueezedError, match="chat template"):
        chat.ask("two?", max_new_tokens=2)


@pytest.mark.parametrize("template", [PromptTemplate.plain(), PromptTemplate("[", " Q:", " A:")])
def test_chat_over_a_template_of_ones_own_has_no_chat_template_text(template):
    model, tokenizer = tiny_model("llama"), with_chat_template(CHAT_TEMPLATES["keeps all"])
    context = squeezed.index(model, tokenizer, document(500), template=template)
    chat = Chat(model, tokenizer, context, context.cache(1.0, implementation="reference"))
    history = context.tokens
    for question in QUESTIONS:
        answer = chat.ask(question, max_new_tokens=6)
        text = template.between + question + template.after
        history = torch.cat([history, torch.tensor(tokenizer(text)["input_ids"])])
        whole = model.generate(history[None], max_new_tokens=6, do_sample=False)
        assert answer.tokens.equal(whole[0, len(history) :])
        history = torch.cat([history, answer.tokens])


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
