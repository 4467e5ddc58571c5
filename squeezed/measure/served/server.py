"""A server of `squeezed vllm`, started for a measurement, and what is asked of it over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, Self

from squeezed.errors import SqueezedError

START_SECONDS = 900.0
ANSWER_SECONDS = 600.0


class Server:
    """One server over the contexts of a directory.

    Args:
        log: where it writes what it says.
        given: further arguments of `squeezed vllm` and of vLLM.
    """

    def __init__(self, model: str, contexts: Path, log: Path, given: Sequence[str] = ()) -> None:
        self.port, self.log = free_port(), open(log, "wb")  # noqa: SIM115, closed by `stop`
        words = [sys.executable, "-m", "squeezed.cli", "vllm", model, "--contexts", str(contexts)]
        words += ["--port", str(self.port), "--host", "127.0.0.1", "--served-model-name", "model"]
        environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        self.process = subprocess.Popen(
            [*words, *given],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        try:
            return self.wait()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *failure: object) -> None:
        self.stop()

    def wait(self) -> Self:
        """Until it answers."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise SqueezedError(f"the server ended with {self.process.returncode}; see its log")
            try:
                self.get("/health")
                return self
            except OSError:
                time.sleep(0.5)
        raise SqueezedError(f"the server did not start in {START_SECONDS:.0f} s; see its log")

    def stop(self) -> None:
        """End it and all that it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(60)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        self.log.close()

    def send(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and JSON of an answer."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as found:
                return found.status, json.loads(found.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as found:
            return found.read().decode()

    def metrics(self) -> dict[str, float]:
        """Every metric, added up over its labels."""
        found: dict[str, float] = {}
        for line in self.get("/metrics").splitlines():
            if line and line[0] != "#":
                name, value = line.split("{")[0].split(" ")[0], float(line.rsplit(" ", 1)[1])
                found[name] = found.get(name, 0.0) + value
        return found

    def complete(self, ids: Sequence[int], arguments: dict[str, Any], tokens: int) -> dict:
        """A greedy answer: `tokens`, and what it `said` of its context."""
        status, answer = self.send("POST", "/v1/completions", _body(ids, arguments, tokens))
        if status != 200:
            return {"tokens": None, "said": {"status": status, "answer": answer}}
        said = (answer.get("kv_transfer_params") or {}).get("squeezed")
        return {"tokens": answer["choices"][0]["token_ids"], "said": said}

    def stream(
        self, ids: Sequence[int], arguments: dict[str, Any], tokens: int
    ) -> Generator[list[int]]:
        """The same in pieces; who stops listening aborts it."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        try:
            body = _body(ids, arguments, tokens) | {"stream": True}
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            for line in connection.getresponse():
                if line.startswith(b"data: {"):
                    chunk = json.loads(line[6:])
                    if chunk.get("choices"):
                        yield chunk["choices"][0].get("token_ids") or []
        finally:
            connection.close()

    def memory_bytes(self) -> int:
        """Memory of its own of its processes, but for those that make contexts and end."""
        import psutil

        first, total = psutil.Process(self.process.pid), 0
        for process in [first, *first.children(recursive=True)]:
            try:
                if "squeezed.vllm.making" not in process.cmdline():
                    total += process.memory_full_info().uss
            except psutil.Error:  # it ended meanwhile
                continue
        return total


def _body(ids: Sequence[int], arguments: dict[str, Any], tokens: int) -> dict[str, Any]:
    return {
        "model": "model",
        "prompt": list(ids),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **({"vllm_xargs": arguments} if arguments else {}),
    }


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
