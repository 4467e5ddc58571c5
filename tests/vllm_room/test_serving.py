import shutil

import pytest
from saved import BLOCK, put
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.vllm.catalogue import Catalogue
from squeezed.vllm.residency import Residency
from squeezed.vllm.serving import Serving
from squeezed.vllm.settings import Settings


@pytest.fixture
def place(tmp_path):
    put(tmp_path, "one")
    put(tmp_path, "two", words=500, seed=1)
    return tmp_path


def serving(place, capacity=1 << 40, **settings):
    catalogue = Catalogue([place], BLOCK, lambda record: record.kv_bytes())
    catalogue.look()
    return Serving(Settings(**settings), catalogue, Residency(capacity))


def prompt(serving, name="one"):
    return [*serving.catalogue.contexts[name].tokens, 7, 8, 9]


def load_all(serving):
    for key in serving.residency.take_orders().load:
        serving.residency.loaded(key)


def test_a_request_reads_the_context_that_begins_its_prompt(place):
    here = serving(place, budget=0.2)
    reading = here.arrive("r", prompt(here, "two"), {})
    assert reading.found.name == "two"
    assert reading.rule == (0.2, "best")
    assert not here.may_begin(reading)
    load_all(here)
    assert here.may_begin(reading)
    reading.read, reading.available = 20, 100
    assert here.end("r").report() == {
        "context": "two",
        "preset": "best",
        "budget": 0.2,
        "budget_spent": 0.2,
        "keys_read": 20,
    }
    assert here.counts.requests == {"context": 1}


def test_a_request_says_what_it_wants(place):
    here = serving(place)
    asked = {"squeezed_budget": 0.5, "squeezed_preset": "paper", "other": 1}
    assert here.arrive("r", prompt(here), asked).rule == (0.5, "paper")
    assert here.arrive("s", prompt(here), {"squeezed_budget": 1}).rule == (1.0, "best")


def test_what_later_keys_depend_on_is_said(place):
    here = serving(place)
    said = {
        here.arrive(str(i), prompt(here, name), asked).said
        for i, (name, asked) in enumerate(
            [
                ("one", {}),
                ("two", {}),
                ("one", {"squeezed_budget": 0.2}),
                ("one", {"squeezed_preset": "paper"}),
                ("one", {"squeezed_budget": 0.1}),  # the default
            ]
        )
    }
    assert len(said) == 4


def test_other_prompts_and_those_that_opt_out_are_none_of_ours(place):
    here = serving(place)
    for number, (ids, asked) in enumerate(
        [([1, 2, 3], {}), (prompt(here), {"squeezed_context": "none"}), (None, {})]
    ):
        reading = here.arrive(str(number), ids, asked)
        assert reading.found is None and reading.report() is None
        assert here.may_begin(reading)
    assert here.counts.requests == {"dense": 3}


@pytest.mark.parametrize(
    "asked, why",
    [
        ({"squeezed_budget": 0}, "budget: expected a share"),
        ({"squeezed_budget": 1.5}, "budget: expected a share"),
        ({"squeezed_budget": "0.1"}, "budget: expected a share"),
        ({"squeezed_budget": True}, "budget: expected a share"),
        ({"squeezed_budget": float("nan")}, "budget: expected a share"),
        ({"squeezed_preset": "worst"}, "squeezed_preset: one was calibrated for paper, best"),
        ({"squeezed_preset": 3}, "squeezed_preset"),
        ({"squeezed_context": "three"}, r"squeezed_context: .*\(one, two\)"),
        ({"squeezed_context": "two"}, "squeezed_context: the prompt does not begin with 'two'"),
        ({"squeezed_context": 5}, "squeezed_context: expected a context's name"),
        ({"squeezed_bugdet": 0.1}, "squeezed_bugdet: expected one of"),
    ],
)
def test_what_cannot_be_honoured_runs_dense_and_is_said(place, asked, why):
    import re

    here = serving(place)
    reading = here.arrive("r", prompt(here), asked)
    assert reading.found is None
    assert re.search(why, reading.report()["fallback"])
    assert here.may_begin(reading)
    assert here.counts.requests == {"fallback": 1}


def test_who_asks_for_a_context_and_has_none_is_told(place):
    here = serving(place)
    report = here.arrive("r", [1, 2, 3], {"squeezed_budget": 0.1}).report()
    assert report["context"] is None and "no registered context" in report["fallback"]


def test_what_is_impossible_is_said_only_where_a_context_fits(place):
    here = serving(place)
    assert here.arrive("r", prompt(here), {}, "lora_request: no").why == "lora_request: no"
    assert here.arrive("s", [1, 2], {}, "lora_request: no").why is None


def test_a_context_too_large_or_lost_runs_dense(place):
    here = serving(place, capacity=10)
    reading = here.arrive("r", prompt(here), {})
    assert here.may_begin(reading)
    assert "context_memory" in reading.report()["fallback"]
    here = serving(place)
    reading = here.arrive("r", prompt(here), {})
    assert not here.may_begin(reading)
    here.residency.failed(reading.found.key, "no such file")
    assert here.may_begin(reading)
    assert reading.report() == {"context": None, "fallback": "no such file"}


def test_a_deleted_context_serves_its_readers_to_the_end(place):
    here = serving(place)
    reading = here.arrive("r", prompt(here), {})
    ids = prompt(here)
    here.may_begin(reading)
    load_all(here)
    shutil.rmtree(place / "one.sqz")
    here.catalogue.look()
    here.tidy()
    assert not here.residency.take_orders().evict
    assert here.may_begin(reading)
    assert here.arrive("s", ids, {}).found is None
    here.end("r")
    here.tidy()
    assert here.residency.take_orders().evict == [reading.found.key]


def test_contexts_with_sliding_windows_run_dense_and_say_so(tmp_path):
    model = tiny_model("gemma3")
    squeezed.index(model, tiny_tokenizer(), document(700)).save(tmp_path / "gemma.sqz")
    here = serving(tmp_path)
    assert "sliding" in here.arrive("r", prompt(here, "gemma"), {}).report()["fallback"]
