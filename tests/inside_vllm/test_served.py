"""`squeezed serve --engine vllm`: our routes in vLLM's server, over the same contexts."""

import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from test_server import Server, free_port

KEY = "a-key-of-sixteen-letters"


class Serve(Server):
    """The same server, started by the other command."""

    def __init__(self, model, contexts, keys, log):
        self.port = free_port()
        self.log = open(log, "wb")  # noqa: SIM115, closed by `stop`
        command = [sys.executable, "-m", "squeezed.cli", "serve", "--engine", "vllm"]
        command += ["--model", str(model), "--contexts", str(contexts), "--budget", "0.2"]
        command += ["--api-key-file", str(keys), "--served-name", "tiny", "--dtype", "float32"]
        command += ["--port", str(self.port), "--enforce-eager", "--max-model-len", "3072"]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT)

    def open(self, path, body=None, key=KEY, method=None):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
            method=method,
        )
        return urllib.request.urlopen(request, timeout=240)

    def ask(self, path, body=None, method=None):
        try:
            with self.open(path, body, method=method) as found:
                return found.status, json.loads(found.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())


@pytest.fixture(scope="module")
def served(place, tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    shutil.copytree(place / "contexts" / "one.sqz", root / "contexts" / "one.sqz")
    (root / "keys").write_text(KEY)
    log = root / "server.log"
    found = Serve(place / "model", root / "contexts", root / "keys", log)
    try:
        yield found.wait()
    finally:
        found.stop()
        sys.stderr.write(log.read_text(errors="replace")[-3000:])


QUESTION = "which word is it?"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 12}


def test_answer_over_a_named_context_is_that_of_its_whole_prompt(served, answers):
    asked = next(one for one in answers["asked"] if one["budget"] == 0.1)
    own = {"prompt": asked["prompt"], "model": "tiny", "max_tokens": 12, "temperature": 0}
    status, whole = served.ask("/v1/completions", own | {"vllm_xargs": {"squeezed_budget": 0.1}})
    assert status == 200
    status, found = served.ask("/v1/chat/completions", CHAT | {"context": "one", "budget": 0.1})
    assert status == 200, found
    assert found["choices"][0]["message"]["content"] == whole["choices"][0]["text"]
    told = found["squeezed"]
    assert told["context"] == "one" and told["matched"] == "name" and told["budget"] == 0.1
    assert 0.05 < told["budget_spent"] < 0.2
    document = len(answers["contexts"]["one"])
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == document
    assert found["usage"]["completion_tokens"] == 12


def test_stream_and_logprobs_are_ours_too(served):
    body = CHAT | {"context": "one", "logprobs": True, "top_logprobs": 2}
    _, whole = served.ask("/v1/chat/completions", body)
    told = whole["choices"][0]["logprobs"]["content"]
    assert len(told) == 12 and all(len(one["top_logprobs"]) >= 2 for one in told)
    with served.open("/v1/chat/completions", CHAT | {"context": "one", "stream": True}) as stream:
        lines = [line[6:] for line in stream.read().decode().splitlines() if line[:6] == "data: "]
    chunks = [json.loads(line) for line in lines[:-1]]
    texts = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert "".join(texts) == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["squeezed"]["context"] == "one" and lines[-1] == "[DONE]"


def test_what_names_no_context_is_vllms_own(served):
    status, found = served.ask("/v1/chat/completions", CHAT | {"top_k": 5, "budget": 0.1})
    assert status == 400 and found["error"]["param"] == "top_k"  # ours refuses it
    status, found = served.ask("/v1/completions", {"model": "tiny", "prompt": "a", "top_k": 5})
    assert status == 200 and "squeezed" not in found
    assert served.ask("/v1/models")[1]["data"][0]["id"] == "tiny"


def test_passages_are_refused_and_keys_are_asked_for(served):
    body = CHAT | {"context": "one", "squeezed": {"passages": True}}
    status, found = served.ask("/v1/chat/completions", body)
    assert status == 400 and "local engine" in found["error"]["message"]
    for path in ("/v1/models", "/v1/contexts", "/metrics"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            served.open(path, key="another-key-of-some-length")


def test_document_becomes_a_context_by_a_job(served):
    text = "alpha beta gamma delta epsilon zeta eta theta. " * 16
    status, job = served.ask("/v1/contexts", {"name": "made", "text": text})
    assert status == 202
    until = time.monotonic() + 240
    while job["state"] in ("waiting", "running") and time.monotonic() < until:
        time.sleep(0.5)
        job = served.ask(f"/v1/jobs/{job['id']}")[1]
    assert job["state"] == "done", job
    assert {one["id"] for one in served.ask("/v1/contexts")[1]["data"]} == {"one", "made"}
    status, found = served.ask("/v1/chat/completions", CHAT | {"context": "made"})
    assert status == 200 and found["squeezed"]["context"] == "made", found
    assert served.ask("/v1/contexts/made", method="DELETE")[1]["deleted"]
    assert served.ask("/v1/chat/completions", CHAT | {"context": "made"})[0] == 404
