"""Beside vLLM: which requests are ours, and what its server is started with."""

import asyncio
import json

import pytest

import squeezed
from squeezed.server.beside.launch import environment_of, words_of
from squeezed.server.beside.plugin import Beside, asks_for_ours
from squeezed.server.settings import ServerSettings


def test_settings_reach_the_server_through_its_environment(tmp_path, monkeypatch):
    given = {
        "model": "a-model", "contexts": tmp_path, "engine": "vllm", "port": 8123, "rows": 7,
        "budget": 0.05, "keep_control_tokens": True, "grace_seconds": 2.5,
    }  # fmt: skip
    settings = ServerSettings.of(given)
    found = environment_of(settings, {"PATH": "/bin"}, on_cpu=True)
    assert "squeezed_server" in found["VLLM_PLUGINS"].split(",")
    assert "squeezed" in found["VLLM_PLUGINS"].split(",") and found["PATH"] == "/bin"
    for name, value in found.items():
        if name.startswith("SQUEEZED_"):
            monkeypatch.setenv(name, value)
    assert ServerSettings.of({}) == settings


def test_command_line_is_vllms_with_our_settings(tmp_path):
    settings = ServerSettings.of({"model": "m", "served_name": "n", "contexts": tmp_path})
    words = words_of(settings, ["--tensor-parallel-size", "2"], on_cpu=False)
    for pair in (("--port", "8000"), ("--host", "127.0.0.1"), ("--served-model-name", "n")):
        place = words.index(pair[0])
        assert tuple(words[place : place + 2]) == pair
    assert words[-2:] == ["--tensor-parallel-size", "2"] and "--dtype" not in words
    transfer = json.loads(words[words.index("--kv-transfer-config") + 1])
    assert transfer["kv_connector_extra_config"]["contexts"] == [str(tmp_path)]
    for word in ("--port=1", "--api-key", "--host"):
        with pytest.raises(squeezed.SqueezedError, match="it is a setting of squeezed serve"):
            words_of(settings, [word], on_cpu=False)


def test_answers_are_ours_if_they_ask_for_what_vllm_does_not_know():
    for field in ("context", "budget", "preset", "squeezed"):
        assert asks_for_ours(json.dumps({"model": "m", field: 1}).encode())
    for body in (b'{"model": "m"}', b"[]", b"{", b"", b'"context"', b"\xff", b"[" * 100_000):
        assert not asks_for_ours(body)


def test_requests_go_where_they_belong_with_their_bodies():
    seen = []

    def application(name):
        async def app(scope, receive, send):
            body, more = b"", True
            while more:
                message = await receive()
                body, more = body + message["body"], message["more_body"]
            seen.append((name, scope["path"], body))

        return app

    beside = Beside(application("vllm"), application("ours"))
    ours, plain = b'{"context": "a"}', b'{"model": "a"}'
    cases = [
        ("GET", "/", b"", "ours"),
        ("GET", "/v1/contexts", b"", "ours"),
        ("PATCH", "/v1/contexts/a", b"{}", "ours"),
        ("GET", "/v1/jobs/x/events", b"", "ours"),
        ("GET", "/page/page.js", b"", "ours"),
        ("POST", "/v1/chat/completions", ours, "ours"),
        ("POST", "/v1/completions", plain, "vllm"),
        ("POST", "/v1/embeddings", ours, "vllm"),
        ("GET", "/v1/models", b"", "vllm"),
        ("GET", "/metrics", b"", "vllm"),
        ("GET", "/v1/contextsx", b"", "vllm"),
    ]

    async def send_all():
        for method, path, body, _ in cases:
            parts = [body[:5], body[5:]]
            messages = iter(
                {"type": "http.request", "body": part, "more_body": not number}
                for number, part in enumerate(parts)
            )

            async def receive(messages=messages):
                return next(messages)

            await beside({"type": "http", "method": method, "path": path}, receive, None)

    asyncio.run(send_all())
    assert seen == [(name, path, body) for _, path, body, name in cases]
