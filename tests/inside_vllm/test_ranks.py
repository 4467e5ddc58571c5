"""Two KV heads on two ranks answer as one rank, and as Transformers does."""

import sys
from pathlib import Path

import pytest
from engines import ask, capture, check_alike, engine, until

from squeezed.context.storage.directory import load

sys.path.insert(0, str(Path(__file__).parents[1]))
from reference import TEXTS
from tiny import document


@pytest.fixture(scope="module")
def llm(place):
    made = engine(place, tensor_parallel_size=2, distributed_executor_backend="mp")
    yield made
    made.llm_engine.engine_core.shutdown()


def test_two_ranks_answer_as_transformers(llm, answers):
    wanted = [one for one in answers["asked"] if one["preset"] == "best"]
    found = ask(llm, [(one["prompt"], {"squeezed_budget": one["budget"]}) for one in wanted])
    for one, other in zip(found, wanted, strict=True):
        assert one["tokens"] == other["tokens"]
        said = one["said"]
        assert said["context"] == "one"
        assert said["budget_spent"] == pytest.approx(other["spent"], rel=0.1)
        if other["budget"] == 1.0:
            assert said["budget_spent"] == 1.0


def test_two_ranks_capture_what_one_process_would_save(llm, place, answers):
    """Each rank has half of the heads; the context has all, and is read as the other is."""
    found = capture(llm, place, "own.sqz", document(*TEXTS["one"][:2]))
    assert found["state"] == "saved" and found["tokens"] == len(answers["contexts"]["one"])
    check_alike(*(load(place / "contexts" / f"{name}.sqz") for name in ("own", "one")))
    assert not [path for path in (place / "contexts").iterdir() if path.name[0] == "."]
    asked = answers["asked"][0]["prompt"], {"squeezed_context": "own"}
    until(lambda: ask(llm, [asked], new=1)[0]["said"]["context"] == "own")
    for wanted in answers["asked"]:
        if wanted["preset"] == "best":
            asked = {"squeezed_budget": wanted["budget"], "squeezed_context": "own"}
            one = ask(llm, [(wanted["prompt"], asked)])[0]
            assert one["said"]["context"] == "own"
            assert one["said"]["budget_spent"] == pytest.approx(wanted["spent"], rel=0.1)
            assert wanted["budget"] < 1 or one["tokens"] == wanted["tokens"]
