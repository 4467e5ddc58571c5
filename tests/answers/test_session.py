"""A session: one model, many contexts, many threads, and the model comes back as it was."""

import gc
import sys
import threading
import time

import pytest
import torch
import transformers
from tiny import document, tiny_tokenizer
from tiny import tiny_model as cached_model

import squeezed
from squeezed import engine
from squeezed.answers.chat import Chat
from squeezed.hf.asking import Asking
from squeezed.hf.switch import using_attention

tiny_model = cached_model.__wrapped__  # one of its own for every test that edits it
QUESTION = "What is alpha?"
SHORT = {"budget": 0.2, "implementation": "reference", "max_new_tokens": 6}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two contexts of one model, saved, and the answers that `generate` gives from them."""
    root, answers = tmp_path_factory.mktemp("contexts"), {}
    for name, seed in (("one", 0), ("two", 1)):
        context = squeezed.index(cached_model(), tiny_tokenizer(), document(600, seed))
        context.save(root / f"{name}.sqz")
        answers[name] = generated(context)
    assert not answers["one"].tokens.equal(answers["two"].tokens)
    return root, answers


def generated(context, question=QUESTION, **arguments):
    arguments = SHORT | arguments
    return squeezed.generate(cached_model(), tiny_tokenizer(), context, question, **arguments)


@pytest.fixture
def session(saved):
    root, _ = saved
    with squeezed.Session(cached_model(), tiny_tokenizer()) as session:
        for name in ("one", "two"):
            session.open(root / f"{name}.sqz")
        yield session


def state(model):
    configs = [x.config for x in model.modules() if isinstance(x, transformers.PreTrainedModel)]
    return (
        [config._attn_implementation_internal for config in configs],
        [module.training for module in model.modules()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        [(name, id(value)) for m in model.modules() for name, value in vars(m).items()],
    )


def test_session_answers_as_generate_does(session, saved):
    for name in ("one", "two"):
        answer, expected = session.ask(name, QUESTION, **SHORT), saved[1][name]
        assert answer.tokens.equal(expected.tokens) and answer.spending == expected.spending
        assert answer.budget == 0.2 and 0 < answer.spending.budget < 1
    assert session.names == ("one", "two")


def test_session_takes_a_context_without_a_name(session, saved):
    context = session.index(document(600, 1))
    assert session.names == ("one", "two")
    assert session.ask(context, QUESTION, **SHORT).tokens.equal(saved[1]["two"].tokens)


def test_session_keeps_what_it_indexes_under_a_name_until_it_is_dropped(session, saved):
    session.index(document(600, 1), "three")
    assert session.ask("three", QUESTION, **SHORT).tokens.equal(saved[1]["two"].tokens)
    session.drop("three")
    with pytest.raises(squeezed.SqueezedError, match=r"'three' is not open; open are 'one', 'two'"):
        session.ask("three", QUESTION, **SHORT)


def in_threads(works):
    """Run all at once; raises what one of them raised."""
    failures, start = [], threading.Barrier(len(works))

    def run(work):
        try:
            start.wait(60)
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_threads_get_the_answers_they_would_have_alone(session, saved):
    root, expected = saved
    lookup = {"prompt_lookup_num_tokens": 3}  # changes what the model is given on its way
    assisted = {name: generated(session.context(name), **lookup).tokens for name in ("one", "two")}
    found = []

    def ask(name):
        for _ in range(2):
            found.append((expected[name].tokens, session.ask(name, QUESTION, **SHORT).tokens))

    def ask_assisted(name):
        answer = session.ask(name, QUESTION, **SHORT, **lookup)
        found.append((assisted[name], answer.tokens))

    def stream(name):
        found.append((expected[name].tokens, session.stream(name, QUESTION, **SHORT).answer.tokens))

    def open_another():
        session.open(root / "two.sqz", "three")
        found.append((expected["two"].tokens, session.ask("three", QUESTION, **SHORT).tokens))
        session.drop("three")

    def fail():
        with pytest.raises(squeezed.SqueezedError, match="max_new_tokenz"):
            session.ask("one", QUESTION, max_new_tokenz=3)

    works = [lambda f=f, n=n: f(n) for f in (ask, ask_assisted, stream) for n in ("one", "two")]
    in_threads([*works, open_another, fail])
    assert len(found) == 9 and all(a.equal(b) for a, b in found)
    assert session.names == ("one", "two")


def test_threads_that_write_control_tokens_as_text_do_not_disturb_others(session):
    """How special tokens are split is a state of the tokenizer."""
    tokenizer, context = tiny_tokenizer(), session.context("one")
    question = "Is </s> a <s> token?"
    expected = context.template.question_ids(tokenizer, question)
    before = sys.getswitchinterval()

    def write():
        for _ in range(200):
            assert context.template.question_ids(tokenizer, question).equal(expected)

    def look():
        for _ in range(400):
            engine.check_tokenizer(tokenizer, context)

    try:
        sys.setswitchinterval(1e-5)
        in_threads([write, write, look])
    finally:
        sys.setswitchinterval(before)


def test_stream_is_the_answer_in_pieces(session, saved):
    expected = saved[1]["one"]
    stream = session.stream("one", QUESTION, **SHORT)
    pieces = list(stream)
    assert "".join(pieces) == expected.text == stream.answer.text
    assert stream.answer.tokens.equal(expected.tokens)
    assert stream.answer.spending == expected.spending


def test_stream_that_is_left_stops_the_work_and_leaves_nothing(session, saved):
    long = SHORT | {"max_new_tokens": 3000}
    for piece in session.stream("one", QUESTION, **long):
        assert piece
        break
    gc.collect()
    assert ended([t for t in threading.enumerate() if t.name == "squeezed stream"])
    with session.stream("two", QUESTION, **long) as stream:
        next(stream)
    assert list(stream) == []
    with pytest.raises(squeezed.SqueezedError, match="closed"):
        _ = stream.answer
    assert session.ask("one", QUESTION, **SHORT).tokens.equal(saved[1]["one"].tokens)


def ended(threads, seconds=60):
    until = time.monotonic() + seconds
    while any(thread.is_alive() for thread in threads) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(thread.is_alive() for thread in threads)


def test_stream_refuses_before_it_begins_and_raises_what_happens_later(session):
    for name, value in {"use_cache": False, "input_ids": torch.ones(1, 1)}.items():
        with pytest.raises(squeezed.SqueezedError):
            session.stream("one", QUESTION, **{name: value})
    with pytest.raises(squeezed.SqueezedError, match="max_new_tokenz"):
        next(session.stream("one", QUESTION, max_new_tokenz=3))
    with pytest.raises(squeezed.SqueezedError, match="streamer"):
        session.stream("one", QUESTION, streamer=object())

    def broken(ids, scores):
        raise ValueError("mine")

    stream = session.stream("one", QUESTION, **SHORT, logits_processor=[broken])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^mine$"):
            _ = stream.answer


def test_stream_has_the_autocast_of_its_caller(session):
    logits = SHORT | {"output_logits": True, "return_dict_in_generate": True}
    with torch.autocast("cpu", torch.bfloat16):
        context = session.index(document(300))
        expected = session.ask(context, QUESTION, **logits)
        stream = session.stream(context, QUESTION, **logits)
    pairs = zip(expected.output.logits, stream.answer.output.logits, strict=True)
    assert all(a.equal(b) for a, b in pairs)


def test_stream_of_a_chat_continues_it_unless_it_is_closed(session):
    asked, streamed = (session.chat("one", 0.2, implementation="reference") for _ in range(2))
    for question in (QUESTION, "And beta?"):
        with streamed.stream("What else?", max_new_tokens=500) as left:
            next(left)
        expected = asked.ask(question, max_new_tokens=6)
        assert streamed.stream(question, max_new_tokens=6).answer.tokens.equal(expected.tokens)
    assert [turn.question for turn in streamed.turns] == [QUESTION, "And beta?"]


def test_chat_of_a_session_equals_one_made_by_hand(session):
    context = session.context("one")
    cache = context.cache(0.2, implementation="reference")
    by_hand = Chat(cached_model(), tiny_tokenizer(), context, cache)
    chat = session.chat("one", 0.2, implementation="reference")
    for question in (QUESTION, "And beta?"):
        answers = [each.ask(question, max_new_tokens=6) for each in (by_hand, chat)]
        assert answers[0].tokens.equal(answers[1].tokens)
        assert session.sources(answers[1])


def test_sources_of_an_answer_equal_those_of_its_cache(session):
    from squeezed.answers.reading import traffic
    from squeezed.answers.sources import ask_neutral, sources
    from squeezed.hf.answer import respond

    context, pair = session.context("one"), (cached_model(), tiny_tokenizer())
    cache, neutral = (context.cache(0.2, implementation="reference") for _ in range(2))
    cache.watch_queries()
    ids = context.template.question_ids(tiny_tokenizer(), QUESTION)
    respond(*pair, cache, ids, max_new_tokens=6)
    ask_neutral(*pair, context, neutral)
    answers = [session.ask("one", QUESTION, **SHORT, watch=True) for _ in range(2)]
    for answer in answers:
        assert session.sources(answer) == sources(tiny_tokenizer(), context, cache, neutral)
        assert session.traffic(answer) == traffic(context, cache)
    with pytest.raises(squeezed.SqueezedError, match="watch=True"):
        session.sources(session.ask("one", QUESTION, **SHORT))


@pytest.mark.parametrize("ends", ["with", "close", "dropped", "error", "while asked"])
def test_session_gives_the_model_back_exactly_as_it_was(ends):
    model = tiny_model().train()
    model.model.layers[1].eval()
    model.config._attn_implementation_internal = "eager"
    before = state(model)
    session = squeezed.Session(model, tiny_tokenizer())
    session.index(document(300), "one")
    session.ask("one", QUESTION, **SHORT)
    assert model.config._attn_implementation == "squeezed" and not model.training
    if ends == "with":
        with session:
            pass
    elif ends == "close":
        session.close()
        session.close()
    elif ends == "error":
        with pytest.raises(KeyError), session:
            raise KeyError
    elif ends == "while asked":
        stream = session.stream("one", QUESTION, **SHORT | {"max_new_tokens": 3000})
        next(stream)
        session.close()
        assert model.config._attn_implementation == "squeezed"
        stream.close()
    del session
    gc.collect()
    assert state(model) == before


def test_two_sessions_and_blocks_share_a_model():
    model = tiny_model()
    first, second = (squeezed.Session(model, tiny_tokenizer()) for _ in range(2))
    context = first.index(document(300))
    first.close()
    assert len(second.ask(context, QUESTION, **SHORT).tokens) == 6
    with pytest.raises(squeezed.SqueezedError, match="session"), using_attention(model, "eager"):
        pass
    assert model.config._attn_implementation == "squeezed"
    second.close()
    assert model.config._attn_implementation == "sdpa"


def test_closed_session_refuses_everything(session):
    answer = session.ask("one", QUESTION, **SHORT, watch=True)
    session.close()
    for call in (
        lambda: session.ask("one", QUESTION),
        lambda: session.stream("one", QUESTION),
        lambda: session.chat("one"),
        lambda: session.index("text"),
        lambda: session.open("somewhere.sqz"),
        lambda: session.sources(answer),
    ):
        with pytest.raises(squeezed.SqueezedError, match="session: it is closed"):
            call()
    assert session.names == ()


@pytest.mark.parametrize("large", [False, True])
def test_model_that_is_edited_between_questions_is_refused(large, monkeypatch):
    if large:
        monkeypatch.setattr("squeezed.hf.identity.fingerprint.LARGE", 1)
    model = tiny_model()
    with squeezed.Session(model, tiny_tokenizer()) as session:
        for name, seed in (("one", 0), ("two", 1)):
            session.index(document(300, seed), name)
            session.ask(name, QUESTION, **SHORT)
        weight = model.model.layers[1].mlp.up_proj.weight
        with torch.no_grad():
            weight[3] += 1
        for name in ("one", "two"):
            with pytest.raises(squeezed.ContextFileError, match="another model"):
                session.ask(name, QUESTION, **SHORT)
        with torch.no_grad():
            weight[3] -= 1
        assert len(session.ask("one", QUESTION, **SHORT).tokens) == 6


def test_contexts_of_a_large_model_are_compared_once_each(monkeypatch):
    monkeypatch.setattr("squeezed.hf.identity.fingerprint.LARGE", 1)
    with squeezed.Session(tiny_model(), tiny_tokenizer()) as session:
        for name, seed in (("one", 0), ("two", 1)):
            session.index(document(300, seed), name)
            session.ask(name, QUESTION, **SHORT)
        for name in ("fingerprint.difference", "entries.sketched"):
            monkeypatch.setattr(
                f"squeezed.hf.identity.{name}", lambda *a: pytest.fail("compared again")
            )
        for name in ("one", "two", "one"):
            session.ask(name, QUESTION, **SHORT)


BAD = {
    "context": lambda s: s.ask("three", QUESTION),
    "no text": lambda s: s.ask("one", 3),
    "budget": lambda s: s.ask("one", QUESTION, budget=2),
    "preset": lambda s: s.ask("one", QUESTION, preset="worst"),
    "implementation": lambda s: s.ask("one", QUESTION, implementation="abacus"),
    "method": lambda s: s.ask("one", QUESTION, method="guess"),
    "name": lambda s: s.index(document(300), "one"),
    "path": lambda s: s.open("nowhere.sqz"),
    "drop": lambda s: s.drop("three"),
    "chat": lambda s: s.chat("three"),
    "answer": lambda s: s.sources("an answer"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_is_one_line_and_leaves_nothing(kind, session, saved):
    with pytest.raises(squeezed.SqueezedError) as refused:
        BAD[kind](session)
    assert "\n" not in str(refused.value)
    assert session.names == ("one", "two")
    assert session.ask("one", QUESTION, **SHORT).tokens.equal(saved[1]["one"].tokens)


def test_context_of_another_model_is_refused_when_opened(saved):
    with (
        squeezed.Session(tiny_model(seed=1), tiny_tokenizer()) as session,
        pytest.raises(squeezed.ContextFileError, match="another model"),
    ):
        session.open(saved[0] / "one.sqz")


def test_session_loads_a_model_by_its_path(tmp_path, saved):
    cached_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with squeezed.Session.of(tmp_path, "float32", "cpu") as session:
        session.open(saved[0] / "one.sqz", "manual")
        assert session.names == ("manual",)
        assert len(session.ask("manual", QUESTION, **SHORT).tokens) == 6
    with pytest.raises(squeezed.SqueezedError, match="check the path"):
        squeezed.Session.of(tmp_path / "nothing")


def test_prove_refuses_what_could_not_answer_before_there_is_a_context(session, monkeypatch):
    session.prove(Asking())
    session.prove(Asking(method="quest", implementation="triton"))  # which ignores it
    with pytest.raises(squeezed.SqueezedError, match="needs a context on a GPU"):
        session.prove(Asking(implementation="triton"))
    with pytest.raises(squeezed.SqueezedError, match="expected one of auto"):
        Asking(implementation="abacus")
    with pytest.raises(squeezed.SqueezedError, match="preset: expected one of paper, best"):
        session.prove(Asking(preset="worst"))
    paper = squeezed.IndexConfig(presets=(squeezed.config.PAPER,))
    with pytest.raises(squeezed.SqueezedError, match="preset: expected one of paper, got 'best'"):
        session.prove(Asking(), paper)
