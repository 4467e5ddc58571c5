"""Measurements of a server from outside, against a server of a few lines."""

import json
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from squeezed.errors import SqueezedError
from squeezed.measure.served.load import Case, Tally, cases_over, differing, growth
from squeezed.measure.served.pauses import Listener, spread
from squeezed.measure.served.server import Server

METRICS = """# HELP a_total what it is
a_total{kind="x"} 2.0
a_total{kind="y"} 3.0
b 1.5
"""


class Handler(BaseHTTPRequestHandler):
    """Answers with the last ids of the prompt, and says the context that was named."""

    def do_GET(self):
        self._end(200, METRICS.encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["prompt"] == [0]:
            self._end(400, b'{"error": "no"}')
            return
        ids = body["prompt"][-body["max_tokens"] :]
        context = body.get("vllm_xargs", {}).get("squeezed_context")
        said = {"squeezed": {"context": context}} if context else None
        whole = {"choices": [{"token_ids": ids}], "kv_transfer_params": said}
        if not body.get("stream"):
            self._end(200, json.dumps(whole).encode())
            return
        pieces = [{"choices": [{"token_ids": [one]}]} for one in ids] + [{"choices": []}]
        lines = [f"data: {json.dumps(piece)}\n\n" for piece in pieces] + ["data: [DONE]\n\n"]
        self._end(200, "".join(lines).encode())

    def _end(self, status, content):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words):
        pass


@pytest.fixture
def server():
    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    made = object.__new__(Server)
    made.port = found.server_address[1]
    yield made
    found.shutdown()
    found.server_close()


def test_answers_streams_and_metrics_are_read(server):
    assert server.complete([1, 2, 3], {"squeezed_context": "c"}, 2) == {
        "tokens": [2, 3],
        "said": {"context": "c"},
    }
    assert server.complete([0], {}, 2)["tokens"] is None
    assert list(server.stream([1, 2, 3], {}, 2)) == [[2], [3]]
    assert server.metrics() == {"a_total": 5.0, "b": 1.5}


def test_a_case_is_right_only_if_its_context_was_read(server):
    asked = (("squeezed_context", "c"),)
    assert Case((1, 2), asked, 2, "c").ask(server) == [1, 2]
    assert "c" in Case((1, 2), asked, 2, "d").ask(server)
    assert "None" in Case((1, 2), (), 2, "c").ask(server)
    assert "400" in Case((0,), (), 2, None).ask(server)


def test_what_differs_is_told_with_its_place():
    case = Case((1, 2), (("squeezed_budget", 0.1),), 3, "c")
    assert differing(case, [1, 2, 3], [1, 2, 3]) is None
    assert differing(case, [1, 2, 3], [1, 5, 3])["first_differing_token"] == 1
    assert differing(case, [1, 2, 3], "a reason") == {"error": "a reason"}
    tally = Tally()
    for wrong in (None, {"error": "x"}):
        tally.count("ask", wrong)
    assert tally.done["ask"] == 2 and len(tally.wrong) == 1


def test_requests_are_of_every_kind_and_none_selects_in_blocks():
    documents = {name: tuple(range(start, start + 500)) for name, start in (("a", 0), ("b", 600))}
    cases = cases_over(documents, 40, random.Random(0))
    assert {case.context for case in cases} == {"a", "b", None}
    assert {dict(case.arguments).get("squeezed_preset") for case in cases} == {
        "best",
        "paper",
        None,
    }
    assert any(dict(case.arguments).get("squeezed_context") == "none" for case in cases)
    for case in cases:
        assert case.context is None or case.ids[:500] == documents[case.context]
        assert len(case.ids) <= 500 + 80


def test_memory_that_grows_is_told_from_memory_that_settles():
    assert growth([]) == growth([5]) == growth([0] * 9) == 0
    assert growth([10, 50, 90] + [100] * 60) == 0
    assert growth(list(range(100, 400))) > 0.3
    assert growth([100, 100, 100, 900, 100, 100, 100, 100, 100]) == 0


def test_pauses_are_those_of_a_span():
    listener = Listener(None, [], 0)
    listener.times = [0.0, 0.1, 0.2, 0.7, 0.8]
    assert listener.between(0.15, 0.75) == pytest.approx([100, 500])
    found = spread([10.0] * 99 + [500.0])
    assert found["longest"] == 500 and found["median"] == 10 and found["tokens"] == 100
    with pytest.raises(SqueezedError, match="too few"):
        spread([1.0] * 5)
