"""A model with sliding windows runs dense where a context fits its prompt, and says so."""

import pytest
from engines import ask, engine


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
