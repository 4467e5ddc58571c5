"""Kill -9 in the midst of reading, sorting and saving a document, and of answers; then go on."""

import json
import subprocess
import threading
import time

import httpx
import pytest
from test_server_faults import ASK, address, command, saved_model
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.context.storage.directory import load

QUESTION = ASK | {"max_tokens": 6, "budget": 0.3}


class Killable:
    """A server as a process of its own, over the same directory each time."""

    def __init__(self, root, model):
        self.words = command(root, model)
        self.start()

    def start(self):
        self.process = subprocess.Popen(self.words, stderr=subprocess.PIPE, text=True)
        self.http = httpx.Client(base_url=address(self.process), timeout=60)
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.http.close()

    def told(self, name):
        found = self.http.post("/v1/chat/completions", json=QUESTION | {"context": name}).json()
        return found["choices"][0]["message"]["content"]

    def known(self):
        found = self.http.get("/v1/contexts").json()
        assert found["refused"] == []
        return {each["id"] for each in found["data"]}

    def kill_in(self, job, phase):
        """Wait for a step of a job, then kill."""
        with self.http.stream("GET", f"/v1/jobs/{job}/events") as events:
            for line in events.iter_lines():
                if not line.startswith("data: "):
                    continue
                now = json.loads(line[6:])
                if now["phase"] == phase or now["state"] not in ("waiting", "running"):
                    break
            self.process.kill()
        self.kill()
        return now

    def ended(self, job):
        until = time.monotonic() + 120
        while time.monotonic() < until:
            now = self.http.get(f"/v1/jobs/{job}").json()
            if now["state"] not in ("waiting", "running"):
                return now
            time.sleep(0.1)
        raise AssertionError(now)


@pytest.fixture(scope="module")
def killable(tmp_path_factory):
    place = tmp_path_factory.mktemp("killed")
    model = saved_model(place / "model")
    context = squeezed.index(tiny_model(), tiny_tokenizer(), document(600))
    context.save(place / "contexts" / "one.sqz")
    found = Killable(place / "contexts", model)
    yield found, place / "contexts"
    found.kill()


def begin_answers(served, count):
    """Streams that are being written when the server is killed."""
    streams = []
    for _ in range(count):
        body = QUESTION | {"context": "one", "stream": True, "max_tokens": 500}
        stream = served.http.stream("POST", "/v1/chat/completions", json=body)
        lines = stream.__enter__().iter_lines()
        next(lines)
        streams.append((stream, lines))
    return streams


@pytest.mark.parametrize("phase", ["prefill", "cluster", "save"])
def test_killed_while_it_reads_sorts_or_saves_and_answers(killable, phase):
    """What was complete is there and answers the same; what was on its way is made after all, and
    is what it would have been."""
    served, root = killable
    before = {name: served.told(name) for name in served.known()}
    assert "one" in before
    streams = begin_answers(served, 2)
    text = document(2000, seed=len(phase))
    job = served.http.post("/v1/contexts", json={"name": phase, "text": text}).json()["id"]
    served.kill_in(job, phase)
    for stream, lines in streams:
        with pytest.raises(httpx.HTTPError):
            list(lines)
        stream.__exit__(None, None, None)
    served.start()
    assert before.keys() <= served.known()
    assert {name: served.told(name) for name in before} == before
    assert served.ended(job)["state"] == "done"
    expected = squeezed.index(tiny_model(), tiny_tokenizer(), text)
    made = load(root / f"{phase}.sqz")
    assert made.tokens.equal(expected.tokens)
    for own, known in zip(made.layers, expected.layers, strict=True):
        assert own.positions.equal(known.positions) and own.keys.equal(known.keys)
    assert served.told(phase)
    left = {path.name for path in root.iterdir() if not path.name.endswith(".sqz")}
    assert all(name.startswith(".") for name in left) and len(left) == 1


def test_killed_while_text_is_put_behind_a_context_that_answers(killable):
    """The old version or the new one is there, whole; in the end it is the new one."""
    served, root = killable
    old = load(root / "one.sqz").tokens
    streams = begin_answers(served, 1)
    more = {"text": " " + document(300, seed=9)}
    job = served.http.post("/v1/contexts/one/append", json=more).json()["id"]
    served.kill_in(job, "save")
    for stream, lines in streams:
        with pytest.raises(httpx.HTTPError):
            list(lines)
        stream.__exit__(None, None, None)
    served.start()
    assert "one" in served.known() and served.told("one")
    assert served.ended(job)["state"] == "done"
    new = load(root / "one.sqz").tokens
    assert new[: len(old)].equal(old)
    assert tiny_tokenizer().decode(new[len(old) :]) == more["text"]
    assert served.told("one")
