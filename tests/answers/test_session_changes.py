"""Contexts of a session whose text changes: a name leads to the new version, readers finish."""

import pytest
from tiny import document, tiny_model, tiny_tokenizer

import squeezed

TEXT, MORE = document(400), document(120, seed=1)
SHORT = {"budget": 0.3, "implementation": "reference", "max_new_tokens": 5}


@pytest.fixture
def session():
    with squeezed.Session(tiny_model(), tiny_tokenizer()) as session:
        session.index(TEXT, "manual")
        yield session


def ids(context):
    return tiny_tokenizer().decode(context.tokens).removeprefix("<s>")


def test_a_name_leads_to_the_new_version(session):
    first = session.context("manual")
    second = session.append("manual", MORE)
    assert session.context("manual") is second and ids(second) == TEXT + MORE
    third = session.update("manual", TEXT + "!" + MORE)
    assert session.context("manual") is third and ids(third) == TEXT + "!" + MORE
    fourth = session.crop("manual", 301)
    assert session.context("manual") is fourth and ids(fourth) == TEXT[:300]
    assert ids(first) == TEXT and session.names == ("manual",)


def test_a_context_without_a_name_is_left_alone(session):
    first = session.context("manual")
    second = session.append(first, MORE)
    assert session.context("manual") is first and len(second.tokens) == len(first.tokens) + 120


def test_an_answer_that_is_being_written_finishes_on_the_old_version(session):
    whole = session.ask("manual", "What is alpha?", **SHORT).text
    stream = session.stream("manual", "What is alpha?", **SHORT)
    pieces = [next(stream)]
    session.append("manual", MORE)
    assert "".join([*pieces, *stream]).strip() == whole


def test_two_changes_at_once_do_not_lose_one(session, monkeypatch):
    from squeezed import engine

    inner = engine.append

    def overtaken(*arguments):
        monkeypatch.setattr(engine, "append", inner)
        session.append("manual", "first")
        return inner(*arguments)

    monkeypatch.setattr(engine, "append", overtaken)
    with pytest.raises(squeezed.SqueezedError, match="changed by another thread"):
        session.append("manual", "second")
    assert ids(session.context("manual")) == TEXT + "first"


def test_what_memory_cannot_hold_is_refused_before_the_model_reads(session, monkeypatch):
    monkeypatch.setattr("squeezed.costs.memory.free_bytes", lambda device: 1000)
    for step in (session.append, session.update):
        with pytest.raises(squeezed.SqueezedError, match="would fit"):
            step("manual", TEXT + MORE)
