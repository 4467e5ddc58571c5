"""`squeezed vllm`: a server that is asked over HTTP, streamed and not, and two replicas of it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from engines import check_alike, until

from squeezed.context.storage.directory import load

sys.path.insert(0, str(Path(__file__).parents[1]))
from reference import TEXTS
from tiny import document


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Server:
    """One server, of which requests are asked."""

    def __init__(self, place, log, *arguments):
        self.port = free_port()
        environment = dict(os.environ)
        environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        self.log = open(log, "wb")  # noqa: SIM115, closed by `stop`
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "squeezed.cli", "vllm", str(place / "model")),
                *("--contexts", str(place / "contexts"), "--budget", "0.2"),
                *("--port", str(self.port), "--host", "127.0.0.1"),
                *("--dtype", "float32", "--enforce-eager", "--max-model-len", "3072"),
                *("--served-model-name", "tiny", "--api-key", "secret", *arguments),
            ],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=environment,
        )

    def wait(self, seconds=400):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, "the server ended"
            try:
                self.get("/health")
                return self
            except (urllib.error.URLError, ConnectionError):
                time.sleep(1)
        raise AssertionError("the server did not start")

    def open(self, path, body=None, key="secret"):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
        )
        return urllib.request.urlopen(request, timeout=120)

    def send(self, method, path, body=None):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": "Bearer secret"},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=240) as found:
                return found.status, json.loads(found.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def get(self, path):
        with self.open(path) as found:
            return found.read().decode()

    def complete(self, ids, arguments=None, **body):
        body = {
            "model": "tiny",
            "prompt": ids,
            "max_tokens": 12,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            **({"vllm_xargs": arguments} if arguments else {}),
            **body,
        }
        with self.open("/v1/completions", body) as found:
            return found.read().decode()

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


@pytest.fixture(scope="module")
def server(place, tmp_path_factory):
    log = tmp_path_factory.mktemp("logs") / "server.log"
    found = Server(place, log)
    try:
        yield found.wait()
    finally:
        found.stop()
        sys.stderr.write(log.read_text(errors="replace")[-3000:])


def prompt(answers, name="one"):
    return [*answers["contexts"][name], 60, 61, 62]


def tokens(answer):
    return answer["choices"][0]["token_ids"]


def test_an_answer_tells_what_it_read(server, answers):
    answer = json.loads(server.complete(prompt(answers), {"squeezed_budget": 0.1}))
    said = answer["kv_transfer_params"]["squeezed"]
    assert said["context"] == "one" and said["budget"] == 0.1
    assert 0.05 < said["budget_spent"] < 0.2
    usual = json.loads(server.complete(prompt(answers)))
    assert usual["kv_transfer_params"]["squeezed"]["budget"] == 0.2


def test_a_streamed_answer_is_the_same_and_tells_at_the_endpoint(server, answers):
    whole = json.loads(server.complete(prompt(answers), {"squeezed_budget": 0.1}))
    lines = server.complete(prompt(answers), {"squeezed_budget": 0.1}, stream=True).splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line[:6] == "data: " and "{" in line]
    streamed = [token for chunk in chunks for token in tokens(chunk)]
    assert streamed == tokens(whole)
    said = json.loads(server.get(f"/v1/squeezed/requests/{chunks[0]['id']}"))
    for name in ("context", "budget", "preset"):
        assert said[name] == whole["kv_transfer_params"]["squeezed"][name]
    assert said["keys_read"] == whole["kv_transfer_params"]["squeezed"]["keys_read"]


def test_a_fall_back_is_said_at_the_endpoint_too(server, answers):
    answer = json.loads(server.complete(prompt(answers, "three"), {"squeezed_budget": 7}))
    assert "budget" in answer["kv_transfer_params"]["squeezed"]["fallback"]
    said = json.loads(server.get(f"/v1/squeezed/requests/{answer['id']}"))
    assert "budget" in said["fallback"] and said["context"] is None


def test_contexts_are_listed_and_those_that_are_refused(server, place):
    (place / "contexts" / "nothing.sqz").mkdir()
    listed = json.loads(server.get("/v1/contexts"))
    assert [one["id"] for one in listed["data"]] == ["one", "three", "two"]
    assert [one["id"] for one in listed["refused"]] == ["nothing"]
    (place / "contexts" / "nothing.sqz").rmdir()


def test_strangers_and_unknown_requests_get_nothing(server):
    for path, key, status in (
        ("/v1/squeezed/requests/cmpl-none", "secret", 404),
        ("/v1/squeezed/requests/cmpl-none", "wrong", 401),
        ("/v1/contexts", "wrong", 401),
    ):
        with pytest.raises(urllib.error.HTTPError) as error:
            server.open(path, key=key)
        assert error.value.code == status


def test_metrics_are_vllms_and_ours(server):
    lines = server.get("/metrics").splitlines()
    found = {line.split("{")[0]: float(line.split()[-1]) for line in lines if "{" in line}
    assert found["squeezed_keys_read_total"] > 0
    assert found["squeezed_contexts"] == 3
    assert "vllm:prompt_tokens_total" in found
    kinds = [line for line in lines if line.startswith("squeezed_requests_total{")]
    assert any('kind="context"' in line for line in kinds)
    assert any('kind="fallback"' in line for line in kinds)


def test_a_document_is_indexed_by_the_server_and_removed(server, place, answers):
    """Its keys are those that Transformers makes, and answers over it are those over that."""
    text = document(*TEXTS["one"][:2])
    status, made = server.send("POST", "/v1/contexts", {"name": "own", "text": text})
    assert status == 201, made
    assert made["tokens"] == len(answers["contexts"]["one"])
    check_alike(*(load(place / "contexts" / f"{name}.sqz") for name in ("own", "one")))
    wanted = answers["asked"][0]
    until(lambda: is_found(server, "own", wanted["prompt"]))
    for budget in (1.0, 0.1):
        asked = {"squeezed_context": "own", "squeezed_budget": budget}
        answer = json.loads(server.complete(wanted["prompt"], asked, max_tokens=16))
        said = answer["kv_transfer_params"]["squeezed"]
        assert said["context"] == "own" and said["budget_spent"] == pytest.approx(budget, rel=0.3)
        assert budget < 1 or tokens(answer) == wanted["tokens"]
    assert server.send("DELETE", "/v1/contexts/own")[0] == 200
    assert not (place / "contexts" / "own.sqz").exists()
    assert server.send("DELETE", "/v1/contexts/own")[0] == 404


def test_what_was_read_is_not_read_again(server, place):
    """The name is taken by something else: only what comes after the reading is done again."""
    text, path = document(500, 9), place / "contexts" / "late.sqz"
    path.write_text("something else")
    status, said = server.send("POST", "/v1/contexts", {"name": "late", "text": text})
    assert status == 400 and "not a saved context" in said["error"]["message"]
    path.unlink()
    before = prompt_tokens(server)
    assert server.send("POST", "/v1/contexts", {"name": "late", "text": text})[0] == 201
    assert prompt_tokens(server) == before
    assert load(path).tokens.tolist()
    assert server.send("DELETE", "/v1/contexts/late")[0] == 200


def prompt_tokens(server):
    lines = server.get("/metrics").splitlines()
    return [line for line in lines if line.startswith("vllm:prompt_tokens_total")]


def is_found(server, name, ids):
    """Whether the engine, which looks by itself, has found a context."""
    answer = json.loads(server.complete(ids, {"squeezed_context": name}, max_tokens=1))
    return answer["kv_transfer_params"]["squeezed"].get("context") == name


@pytest.mark.parametrize(
    "body, why",
    [
        ({"name": "../evil", "text": "some words"}, "name"),
        ({"name": "own", "text": "  "}, "text"),
        ({"name": "own"}, "text"),
        ({"name": "own", "text": "alpha " * 3000}, "token"),
        ([], ""),
    ],
)
def test_what_cannot_be_indexed_is_refused_with_the_reason(server, place, body, why):
    status, answer = server.send("POST", "/v1/contexts", body)
    assert status == 400 and why in answer["error"]["message"]
    assert not (place / "contexts" / "own.sqz").exists()


def test_a_second_replica_answers_alike_from_the_same_directory(server, place, answers, tmp_path):
    """Each replica loads contexts by itself: a balancer may send a request to either."""
    if shutil.which("nproc") and (os.cpu_count() or 1) < 2:
        pytest.skip("two servers on one processor spin against each other")
    other = Server(place, tmp_path / "other.log")
    try:
        other.wait()
        for name in ("one", "two"):
            body = prompt(answers, name), {"squeezed_budget": 0.1}
            mine, its = (json.loads(one.complete(*body)) for one in (server, other))
            assert tokens(mine) == tokens(its)
            assert mine["kv_transfer_params"] == its["kv_transfer_params"]
        # what one makes the other finds, and forgets when it is removed
        body = {"name": "shared", "text": document(500, 11)}
        assert other.send("POST", "/v1/contexts", body)[0] == 201
        ids = [*load(place / "contexts" / "shared.sqz").tokens.tolist(), 60, 61]
        until(lambda: is_found(server, "shared", ids))
        asked = ids, {"squeezed_context": "shared", "squeezed_budget": 0.3}
        mine, its = (json.loads(one.complete(*asked)) for one in (server, other))
        assert tokens(mine) == tokens(its)
        assert mine["kv_transfer_params"] == its["kv_transfer_params"]
        assert server.send("DELETE", "/v1/contexts/shared")[0] == 200
        until(lambda: not is_found(other, "shared", ids))
    finally:
        other.stop()
