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

import pytest


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

    def wait(self, seconds=240):
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
    finally:
        other.stop()
