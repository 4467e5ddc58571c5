"""A model with sliding windows runs dense where a context fits its prompt, and says so."""

import json

import pytest
from engines import ask, engine, metric


@pytest.fixture(scope="module")
def llm(place):
    made = engine(place / "gemma")
    yield made
    made.llm_engine.engine_core.shutdown()


def test_sliding_windows_run_dense_and_say_so(llm, answers):
    fits = [*answers["gemma"], 50, 51]
    one, other, plain = ask(llm, [(fits, {}), (fits, {"squeezed_context": "none"}), ([5, 6], {})])
    assert "sliding" in one["said"]["fallback"]
    assert other["said"] is None and plain["said"] is None
    assert one["tokens"] == other["tokens"]


def test_a_crowd_runs_dense_and_is_counted(llm, answers):
    """Whatever is asked, the answer is that of everything read."""
    fits = [*answers["gemma"], 50, 51]
    asked = [{}, {"squeezed_budget": 0.1}, {"squeezed_preset": "paper"}]
    asked += [{"squeezed_context": "sliding"}, {"squeezed_context": "none"}]
    before = metric(llm, "squeezed_requests")
    found = ask(llm, [(fits, one) for one in asked])
    assert {tuple(one["tokens"]) for one in found} == {tuple(found[-1]["tokens"])}
    assert all("sliding" in one["said"]["fallback"] for one in found[:-1])
    assert all(one["said"]["context"] is None for one in found[:-1])
    assert metric(llm, "squeezed_requests") >= before + len(asked) - 1
    assert metric(llm, "squeezed_loads") == 0


def test_a_document_is_not_indexed_and_why_is_said(llm, place):
    from transformers import AutoTokenizer

    from squeezed.vllm.asking import Asked
    from squeezed.vllm.capture import ARGUMENT

    tokenizer = AutoTokenizer.from_pretrained(place / "gemma" / "model")
    asked = Asked.of(tokenizer, "own.sqz", "alpha beta " * 40)
    assert json.loads(asked.argument)["tokens"] == len(asked.prompt)
    said = ask(llm, [(asked.prompt, {ARGUMENT: asked.argument})], new=1)[0]["said"]
    assert "sliding" in said["fallback"]
    assert [path.name for path in (place / "gemma" / "contexts").iterdir()] == ["sliding.sqz"]
