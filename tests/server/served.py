"""A real server over a tiny random model, in a thread, and OpenAI's own client for it."""

import asyncio
import contextlib
import threading
import time

import httpx
import openai
from tiny import tiny_model, tiny_tokenizer

from squeezed.answers.session import Session
from squeezed.server.app import create_app
from squeezed.server.local.engine import LocalEngine
from squeezed.server.run import Runner, bound, config_of, limits_of
from squeezed.server.settings import ServerSettings


class Served:
    """A server that runs; `base` is its address."""

    def __init__(self, runner, thread, port, app):
        self.runner, self.thread, self.app = runner, thread, app
        self.base = f"http://127.0.0.1:{port}"

    @property
    def server(self):
        return self.app.state.squeezed

    @property
    def engine(self):
        return self.server.engine

    def http(self, **arguments):
        return httpx.Client(base_url=self.base, timeout=60, **arguments)

    def openai(self, key="-"):
        return openai.OpenAI(base_url=f"{self.base}/v1", api_key=key, max_retries=0, timeout=300)

    def make(self, name, text, **more):
        """Index a document, and wait for it."""
        with self.http() as http:
            answer = http.post("/v1/contexts", json={"name": name, "text": text, **more})
            assert answer.status_code == 202, answer.text
            return self.wait(answer.json()["id"])

    def wait(self, job, seconds=120):
        until = time.monotonic() + seconds
        with self.http() as http:
            while time.monotonic() < until:
                found = http.get(f"/v1/jobs/{job}").json()
                if found["state"] in ("done", "failed", "cancelled"):
                    return found
                time.sleep(0.05)
        raise AssertionError(f"job {job} did not end: {found}")

    def until(self, holds, seconds=30):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if holds():
                return True
            time.sleep(0.02)
        return False

    def stop(self):
        self.runner.leave()
        self.thread.join(60)
        assert not self.thread.is_alive(), "the server did not end"


def start(contexts, model=None, tokenizer=None, **settings):
    """A server over a directory; the reference implementation, greedy unless asked."""
    model, tokenizer = model or tiny_model(), tokenizer or tiny_tokenizer()
    chosen = {
        "contexts": contexts, "served_name": "tiny", "port": 0, "budget": 0.2,
        "implementation": "reference", "answer_tokens": 8, "grace_seconds": 5,
    }  # fmt: skip
    settings = ServerSettings.of(chosen | settings)
    session = Session(model, tokenizer)
    app, guarded = create_app(settings, lambda: LocalEngine(session, limits_of(settings)))
    listening = bound("127.0.0.1", 0)
    runner = Runner(config_of(guarded, settings), app)

    def work():
        asyncio.run(runner.serve(sockets=[listening]))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not runner.started and thread.is_alive() and time.monotonic() < until:
        time.sleep(0.01)
    assert runner.started, "the server did not start"
    return Served(runner, thread, listening.getsockname()[1], app)


@contextlib.contextmanager
def serving(contexts, **settings):
    served = start(contexts, **settings)
    try:
        yield served
    finally:
        served.stop()
