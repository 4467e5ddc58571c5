"""The measurement of a crowd, against a server in a thread: it sees what is right, and what not."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from served import serving
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.errors import SqueezedError
from squeezed.measure.served.crowd import Crowd, cases_over, pause, speed_up, spread
from squeezed.measure.served.load import text_of
from squeezed.measure.served.local import NAME, LocalServer, Seen
from squeezed.measure.served.tiny import tiny


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("contexts")
    for name, seed in (("one", 0), ("two", 1)):
        squeezed.index(tiny_model(), tiny_tokenizer(), document(400, seed)).save(
            root / f"{name}.sqz"
        )
    with serving(root, served_name=NAME) as served:
        found = object.__new__(LocalServer)
        found.port = int(served.base.rpartition(":")[2])
        found.process = SimpleNamespace(pid=os.getpid())
        yield found


@pytest.fixture(scope="module")
def crowd(server):
    return Crowd(server, cases_over(["one", "two"], 10))


def test_crowd_gets_the_answers_that_each_gets_alone(crowd):
    crowd.run(8, 2.0)
    assert crowd.tally.wrong == [] and crowd.tally.done["answered"] > 8
    assert crowd.tally.done.keys() <= {"answered", "left"}
    assert len(crowd.first) >= crowd.tally.done["answered"] and min(crowd.first) > 0
    assert crowd.memory and min(crowd.memory) > 1e6


def test_answer_that_differs_breaks_off_or_fails_is_told(crowd):
    alone, place = crowd.alone[0], len(crowd.tally.wrong)
    cases = (
        Seen(alone.text + "x", [0.1], alone.ended),
        Seen(alone.text, [0.1], ""),
        Seen("", [], "503: no memory"),
        Seen("never this", [0.1], "left"),
    )
    for seen in cases:
        crowd._judge(0, seen)
    assert len(crowd.tally.wrong) == place + len(cases)
    crowd._judge(0, Seen(alone.text[:1], [0.1], "left"))
    crowd._judge(0, alone)
    assert len(crowd.tally.wrong) == place + len(cases)


def test_requests_that_fail_are_seen_as_such(server):
    seen = server.read({"messages": [{"role": "user", "content": "a"}], "context": "three"})
    assert seen.ended.startswith("404") and not seen.times
    with pytest.raises(SqueezedError, match="was not indexed"):
        server.make("../out", "words")


def test_eight_at_once_are_equal_to_eight_apart(server):
    found = speed_up(server, "one", 6, 1)
    assert found["answers_equal"] and len(found["at_once_s"]) == 1
    assert found["speed_up"] > 0


def test_pauses_beside_indexing_are_those_of_the_answer(server):
    found = pause(server, "one", 100)
    assert found["beside"]["longest"] >= found["beside"]["median"] > 0
    assert server.send("DELETE", "/v1/contexts/beside")[0] == 200


def test_tiny_requests_are_all_counted(server):
    found = tiny(server, 200, 4)
    assert found["requests"] == 200 and found["wrong"] == []
    assert found["statuses"] == {"200": 80, "404": 40, "400": 40, "415": 40}


def test_spread_is_in_milliseconds():
    assert spread([0.001] * 99 + [0.5])["longest"] == 500 and spread([0.002] * 9)["median"] == 2
    with pytest.raises(SqueezedError, match="too few"):
        spread([])


def test_requests_are_of_every_kind():
    assert text_of(3, 1) == text_of(3, 1) != text_of(3, 2)
    cases = cases_over(["a", "b"], 20)
    assert {case.get("context") for case in cases} == {"a", "b", None}
    assert all(10 < case["max_tokens"] <= 20 for case in cases)


def test_page_tells_what_the_record_holds():
    root = Path(__file__).parents[2]
    (row,) = json.loads((root / "benchmarks" / "server_load.json").read_text())["rows"]
    page = (root / "docs" / "measurements.md").read_text(encoding="utf-8")
    table = page.split("<!-- crowd -->")[1].split("<!-- /crowd -->")[0]
    results = [line.split(" | ")[-1].strip(" |") for line in table.strip().splitlines()[2:]]
    tiny_ones, pauses = row["tiny_requests"], row["pause_beside_indexing_ms"]
    assert tiny_ones["memory_after"] == tiny_ones["memory_before"] and not tiny_ones["wrong"]
    assert row["eight_on_one_document"]["answers_equal"] and sum(row["done"].values()) == 150

    def seconds(name):
        return ", ".join(f"{row[name][part] / 1e3:.1f} s" for part in ("median", "p90", "p99"))

    assert results == [
        str(row["wrong"]),
        f"{row['eight_on_one_document']['speed_up']} times the throughput",
        f"{row['memory_growth']:.1%}".replace("%", " %"),
        ", ".join(f"{pauses[when]['longest']:.0f} ms" for when in ("quiet", "beside")),
        seconds("first_token_ms"),
        seconds("further_token_ms"),
        f"{tiny_ones['seconds']} s, memory the same",
    ]
