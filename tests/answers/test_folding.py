"""A chat whose oldest turns are clustered answers as one that reads all, and stays small."""

import functools

import pytest
import torch
from hf.test_shapes import sharing
from test_chat import interrupted_between_layers, interrupted_by_reader
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.answers.chat import Chat
from squeezed.config import GrowthConfig
from squeezed.hf.asking import Asking
from squeezed.hf.folding import fold

QUESTIONS = [f"{document(60, seed)} {seed}?" for seed in range(7)]
FOLD_AT = 128


@functools.cache
def indexed(model):
    return squeezed.index(model, tiny_tokenizer(), document(400))


def talk(budget, fold_at=FOLD_AT, family="llama", model=None, **settings):
    model = tiny_model(family) if model is None else model
    asking = Asking(budget, **{"implementation": "reference"} | settings)
    context = indexed(model)
    cache = context.cache_for(asking)
    return Chat(model, tiny_tokenizer(), context, cache, asking=asking, fold_at=fold_at)


def answers(chat, questions=QUESTIONS, new=6):
    return [chat.ask(question, max_new_tokens=new).tokens.tolist() for question in questions]


@pytest.mark.parametrize("family", ["llama", "smollm", "gemma3"])
def test_at_a_budget_of_one_a_folded_chat_answers_as_a_whole_one(family):
    folded, whole = talk(1.0, family=family), talk(1.0, None, family)
    assert answers(folded) == answers(whole)
    assert folded.cache.folded is not None and whole.cache.folded is None
    assert folded.cache.get_seq_length() == whole.cache.get_seq_length()


@pytest.mark.parametrize("settings", [{"implementation": "cpu"}, {"method": "dense"}])
def test_other_implementations_and_methods_fold_too(settings):
    folded, whole = talk(1.0, **settings), talk(1.0, None, **settings)
    assert answers(folded) == answers(whole) and len(folded.cache.folded.tokens) > 200


@pytest.mark.transformers("5.23")
def test_layers_that_share_keys_fold_too():
    types = ["sliding_attention", "full_attention"] * 3
    model = sharing("Gemma4Text", types, 2)
    folded, whole = talk(1.0, model=model), talk(1.0, None, model=model)
    assert answers(folded) == answers(whole) and folded.cache.folded is not None


def test_at_a_small_budget_it_reads_a_share_of_the_folded_turns_too():
    chat = talk(0.1)
    answers(chat)
    view, own = chat.cache.context_layers[0].context, chat.cache.folded.clustered_layers[0]
    assert view.selectable_keys == (284 + 1 + own.tokens) * 2
    answer = chat.ask("What is alpha?", max_new_tokens=6)
    assert 0.03 < answer.spending.budget < 0.3
    assert own.levels and own.pinned == 0


def test_what_is_read_in_full_stays_below_the_limit_and_a_turn():
    chat, held = talk(0.2), []
    for question in QUESTIONS:
        chat.ask(question, max_new_tokens=6)
        held.append(int(chat.cache.layers[0].suffix_length))
    assert max(held) <= FOLD_AT
    windows = talk(0.2, family="gemma3")
    answers(windows)
    for layer in windows.cache.layers:
        assert int(layer.suffix_length) <= FOLD_AT


def test_keys_and_values_of_folded_turns_are_those_that_were_read():
    chat = talk(1.0, 10_000)
    answers(chat)
    layers, held = chat.cache.context_layers, chat.cache
    own = fold(held, chat.context, chat.asking, 300, GrowthConfig()).folded
    assert own.tokens.equal(held.known[:300])
    for layer, entry in zip(own.clustered_layers, layers, strict=True):
        place = layer.positions.long()[..., None].expand_as(layer.keys)
        assert entry.keys[0, :, :300].gather(1, place).equal(layer.keys)
        assert entry.values[0, :, :300].gather(1, place).equal(layer.values)


def test_a_chat_rebuilt_from_scratch_under_the_same_rule_is_the_same():
    one, other = talk(0.2), talk(0.2)
    assert answers(one) == answers(other)
    for a, b in zip(
        one.cache.folded.clustered_layers, other.cache.folded.clustered_layers, strict=True
    ):
        assert a.keys.equal(b.keys) and a.positions.equal(b.positions)


def test_folds_follow_each_other_in_one_tree_or_more():
    chat = talk(0.2)
    answers(chat)
    lengths = [tree.tokens for tree in chat.cache.folded.trees]
    assert sum(lengths) == len(chat.cache.folded.tokens) and len(lengths) == 1
    answer = chat.ask("What is alpha?", max_new_tokens=90)
    assert len(answer.tokens) == 90 and sum(t.tokens for t in chat.cache.folded.trees) > lengths[0]


def test_turns_that_the_template_writes_anew_are_read_again(monkeypatch):
    chat, whole = talk(1.0), talk(1.0, None)
    answers(chat), answers(whole)
    for each in (chat, whole):
        each.turns[0] = each.turns[-1]
    ours, theirs = (answers(each, ["And now?"]) for each in (chat, whole))
    assert ours == theirs and chat.cache.known.equal(whole.cache.known[len(chat.cache.document)
        - len(chat.context.tokens):])  # fmt: skip


@pytest.mark.parametrize("interrupt", [interrupted_by_reader, interrupted_between_layers])
def test_an_interrupted_turn_of_a_folded_chat_never_was(interrupt):
    chat, other = talk(0.2), talk(0.2)
    answers(chat), answers(other)
    interrupt(chat, "And this?")
    assert answers(chat, ["And now?"]) == answers(other, ["And now?"])


def test_several_sequences_go_on_with_the_first():
    chat, whole = talk(1.0), talk(1.0, None)
    for each in (chat, whole):
        answers(each)
        each.ask("Several?", max_new_tokens=4, num_beams=2, num_return_sequences=2)
    assert answers(chat, ["And now?"]) == answers(whole, ["And now?"])


def test_sources_and_traffic_of_a_folded_chat_can_be_asked_for():
    with squeezed.Session(tiny_model(), tiny_tokenizer()) as session:
        session.index(document(400), "manual")
        chat = session.chat("manual", 0.2, fold_at=FOLD_AT, implementation="reference")
        for question in QUESTIONS:
            answer = chat.ask(question, max_new_tokens=4)
        assert chat.cache.folded is not None
        assert len(session.sources(answer)) == 3 and session.traffic(answer).total > 0


def test_two_chats_over_one_context_share_it_and_nothing_else():
    one = talk(0.2)
    context = one.context
    other = Chat(
        one.model, one.tokenizer, context, context.cache_for(one.asking), [], one.asking, FOLD_AT
    )
    alone = answers(talk(0.2), QUESTIONS[3:])
    answers(one)
    assert answers(other, QUESTIONS[3:]) == alone
    for a, b, layer in zip(
        one.cache.context_layers, other.cache.context_layers, context.layers, strict=True
    ):
        assert a.context.layer is b.context.layer is layer


@pytest.mark.parametrize("fold_at", [0, 63, -1, 1.5, "x"])
def test_a_limit_that_makes_no_sense_is_refused(fold_at):
    with pytest.raises(squeezed.SqueezedError, match="fold_at"):
        talk(0.2, fold_at)


def test_a_limit_needs_the_settings_of_the_cache():
    chat = talk(0.2, None)
    with pytest.raises(squeezed.SqueezedError, match="asking"):
        Chat(chat.model, chat.tokenizer, chat.context, chat.cache, fold_at=100)


def test_copies_of_a_folded_cache_share_what_is_folded():
    chat = talk(0.2)
    answers(chat)
    copied = __import__("copy").deepcopy(chat.cache)
    assert copied.folded is chat.cache.folded and torch.equal(copied.known, chat.cache.known)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("sampled", [{}, {"do_sample": True, "repetition_penalty": 1.1}])
def test_a_long_answer_folds_while_it_is_made(family, sampled):
    folded, whole = talk(1.0, family=family), talk(1.0, None, family)
    for each in (folded, whole):
        torch.manual_seed(0)
        each.ask(QUESTIONS[0], max_new_tokens=300, **sampled)
    ours, theirs = (each.turns[0].answer for each in (folded, whole))
    assert ours.equal(theirs)
    assert len(folded.cache.folded.tokens) > 200 and folded.cache.layers[0].suffix_length <= FOLD_AT
    assert answers(folded, QUESTIONS[1:3]) == answers(whole, QUESTIONS[1:3])


def test_spending_counts_what_was_there_to_read_when_it_was_read():
    chat, whole = talk(1.0, method="dense"), talk(0.3)
    assert chat.ask(QUESTIONS[0], max_new_tokens=200).spending.budget == pytest.approx(1)
    assert 0.1 < whole.ask(QUESTIONS[0], max_new_tokens=200).spending.budget < 0.6


def test_a_stream_and_a_criterion_of_the_callers_own_go_with_folding():
    class Stops:
        def __call__(self, ids, scores, **kwargs):
            full = ids.shape[1] >= 700
            return torch.full((len(ids),), full, dtype=torch.bool)

    chat, whole = talk(1.0), talk(1.0, None)
    for given in (Stops(), [Stops()]):
        ours, theirs = (
            each.ask("Go on?", max_new_tokens=400, stopping_criteria=given).text
            for each in (chat, whole)
        )
        assert ours == theirs
    texts = ["".join(x.stream("More?", max_new_tokens=150)) for x in (chat, whole)]
    assert texts[0] == texts[1] and chat.cache.folded is not None


def test_beams_and_assisted_answers_are_right_beside_folding():
    for settings in ({"num_beams": 2}, {"prompt_lookup_num_tokens": 3}):
        chat, whole = talk(1.0), talk(1.0, None)
        ours, theirs = (
            x.ask(QUESTIONS[0], max_new_tokens=120, **settings).text for x in (chat, whole)
        )
        assert ours == theirs and answers(chat, ["And?"]) == answers(whole, ["And?"])
