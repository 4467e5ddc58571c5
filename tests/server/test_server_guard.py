"""Keys, origins, sizes and times; and what a client may see of the server's inside."""

import logging
import socket
import subprocess
import sys
import time

import openai
import pytest
from served import serving
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.server.guard import Keys
from squeezed.server.settings import ServerSettings

KEYS = ["a-key-of-sixteen-letters", "another-key-of-some-length"]
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "What is alpha?"}]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("contexts")
    squeezed.index(tiny_model(), tiny_tokenizer(), document(600)).save(root / "one.sqz")
    return root


@pytest.fixture(scope="module")
def served(root):
    with serving(root, max_body_mb=1, body_seconds=2) as served:
        yield served


def key_file(tmp_path, *lines):
    path = tmp_path / "keys"
    path.write_text("\n".join(lines))
    return path


def test_other_addresses_need_a_key_file(tmp_path):
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(squeezed.SqueezedError, match="can be reached by others; give --api"):
            ServerSettings.of({"host": host})
        file = key_file(tmp_path, KEYS[0])
        assert ServerSettings.of({"host": host, "api_key_file": file}).host == host
    for host in ("127.0.0.1", "localhost", "::1", "127.5.5.5"):
        assert ServerSettings.of({"host": host}).host == host


def test_settings_come_from_flags_then_variables_then_the_file(tmp_path, monkeypatch):
    file = tmp_path / "server.toml"
    file.write_text('port = 1\nbudget = 0.3\nrows = 5\ncontexts = "here"\n')
    monkeypatch.setenv("SQUEEZED_PORT", "2")
    monkeypatch.setenv("SQUEEZED_BUDGET", "0.4")
    found = ServerSettings.of({"port": 3}, file)
    assert (found.port, found.budget, found.rows, str(found.contexts)) == (3, 0.4, 5, "here")
    assert found.queue == ServerSettings.model_fields["queue"].default
    for text, said in (
        ("ports = 1", "no setting is called ports"),
        ("rows = 0", "rows: .* got 0"),
        ("rows =", "cannot be read"),
    ):
        file.write_text(text)
        with pytest.raises(squeezed.SqueezedError, match=said):
            ServerSettings.of({}, file)
    with pytest.raises(squeezed.SqueezedError, match=r"config: .* cannot be read"):
        ServerSettings.of({}, tmp_path / "none.toml")


def test_key_files_without_a_good_key_are_refused(tmp_path):
    for lines in ((), ("# comment", ""), ("short",), ("x" * 600,)):
        with pytest.raises(squeezed.SqueezedError, match="api-key-file"):
            Keys.of_file(key_file(tmp_path, *lines))
    with pytest.raises(squeezed.SqueezedError, match="api-key-file"):
        Keys.of_file(tmp_path / "nothing")


def test_keys_are_asked_for_and_never_logged(root, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    file = key_file(tmp_path, "# of two people", *KEYS)
    with serving(root, api_key_file=file) as served, served.http() as http:
        for path in ("/v1/models", "/v1/contexts", "/metrics", "/openapi.json", "/v1/jobs"):
            assert http.get(path).status_code == 401
            for key in KEYS:
                found = http.get(path, headers={"Authorization": f"Bearer {key}"})
                assert found.status_code == 200
        wrong = (KEYS[0][:-1], KEYS[0] + "x", "-", "x" * 10_000, KEYS[0].upper())
        for key in wrong:
            found = http.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert found.status_code == 401 and found.headers["WWW-Authenticate"] == "Bearer"
        basic = http.get("/v1/models", headers={"Authorization": f"Basic {KEYS[0]}"})
        assert basic.status_code == 401
        for path in ("/health", "/ready"):
            assert http.get(path).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            served.openai("nobody-knows-this-key").models.list()
        assert [model.id for model in served.openai(KEYS[1]).models.list()] == ["tiny"]
    logs = [r.getMessage() for r in caplog.records if r.name.startswith(("squeezed", "uvicorn"))]
    assert logs and not any(key[:8] in line for key in KEYS for line in logs)


def test_one_key_has_so_many_requests_at_work_and_others_go_on(root, tmp_path):
    file = key_file(tmp_path, *KEYS)
    with serving(root, api_key_file=file, requests_per_key=1, max_answer_tokens=3000) as served:
        first, second = (served.openai(key) for key in KEYS)
        long = {"stream": True, "max_tokens": 2000, "extra_body": {"context": "one"}}
        stream = first.chat.completions.create(**ASK, **long)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="1 requests at work"):
            first.chat.completions.create(**ASK, max_tokens=1)
        assert second.chat.completions.create(**ASK, max_tokens=1).choices
        stream.close()
        assert served.until(lambda: served.engine.under_way == 0)
        assert first.chat.completions.create(**ASK, max_tokens=1).choices


def test_pages_of_other_sites_and_bent_names_are_refused(served):
    with served.http() as http:
        own = served.base.removeprefix("http://")
        for headers, status in (
            ({"Origin": "https://evil.example"}, 403),
            ({"Origin": "null"}, 403),
            ({"Host": "evil.example"}, 403),
            ({"Origin": served.base, "Host": own}, 200),
            ({"Host": "localhost:1234"}, 200),
        ):
            found = http.get("/v1/models", headers=headers)
            assert found.status_code == status, headers
        found = http.options("/v1/chat/completions", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in found.headers


def test_every_answer_has_the_headers_that_keep_pages_closed(served):
    with served.http() as http:
        for found in (http.get("/health"), http.get("/nothing"), http.get("/v1/contexts")):
            policy = found.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy
            assert found.headers["x-content-type-options"] == "nosniff"


def test_large_body_is_refused_by_its_length_before_it_comes(served):
    with socket.create_connection(("127.0.0.1", int(served.base.rpartition(":")[2]))) as line:
        line.settimeout(20)
        head = (
            "POST /v1/contexts HTTP/1.1\r\nHost: localhost\r\n"
            "Content-Type: application/json\r\nContent-Length: 10737418240\r\n\r\n"
        )
        line.sendall(head.encode())
        assert line.recv(1000).startswith(b"HTTP/1.1 413")


def test_large_body_without_a_length_is_refused_while_it_comes(served):
    sent = 0

    def body():
        nonlocal sent
        for _ in range(10_000):
            sent += 1 << 16
            yield b"x" * (1 << 16)

    with served.http() as http:
        headers = {"Content-Type": "application/json"}
        try:
            found = http.post("/v1/contexts", content=body(), headers=headers)
            assert found.status_code == 413
            assert found.json()["error"]["code"] == "too_large"
        except OSError:  # it was hung up on, before the answer was read
            pass
        except Exception as error:
            assert "Error" in type(error).__name__
    assert sent < 50 << 20
    with served.http() as http:
        assert http.get("/health").status_code == 200


def test_slow_body_is_ended_in_time(served):
    with socket.create_connection(("127.0.0.1", int(served.base.rpartition(":")[2]))) as line:
        line.settimeout(20)
        started = time.monotonic()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        line.sendall(head.encode())
        assert line.recv(1000).startswith(b"HTTP/1.1 408")
        assert 1 < time.monotonic() - started < 15


def test_fault_shows_nothing_of_the_inside(served, monkeypatch):
    def broken(*given):
        raise RuntimeError("secret detail at /home/secret/place")

    monkeypatch.setattr(served.server.library, "described", broken)
    with served.http() as http:
        found = http.get("/v1/contexts")
        assert found.status_code == 500 and found.json()["error"]["code"] == "fault"
        assert "secret" not in found.text and "Traceback" not in found.text
    monkeypatch.undo()
    with served.http() as http:
        assert http.get("/v1/contexts").status_code == 200


def test_metrics_count_what_happened(root):
    with serving(root) as served, served.http() as http:
        for _ in range(2):
            http.post("/v1/chat/completions", json=ASK | {"context": "one", "max_tokens": 5})
        http.post("/v1/chat/completions", json=ASK | {"context": "none", "max_tokens": 3})
        http.post("/v1/chat/completions", json=ASK | {"context": "one", "max_tokens": 4096 * 2})
        shown = http.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in shown.splitlines() if line[:1] != "#")
    assert values['squeezed_requests_total{ended="length",route="chat"}'] == "3.0"
    assert values["squeezed_generated_tokens_total"] == "13.0"
    assert values['squeezed_prompt_tokens_total{kind="context"}'] == "1202.0"
    assert values['squeezed_context_hits_total{kind="name"}'] == "2.0"
    assert values["squeezed_first_token_seconds_count"] == "3.0"
    assert values["squeezed_budget_spent_count"] == "2.0"
    assert values["squeezed_answers_running"] == values["squeezed_answers_waiting"] == "0.0"
    assert float(values["squeezed_resident_bytes"]) > 1e5
    assert values["squeezed_contexts"] == "1.0"


PACKAGES = "fastapi uvicorn pydantic_settings prometheus_client pypdf docx multipart starlette"


def test_nothing_but_the_server_needs_its_packages_and_it_names_what_brings_them():
    code = f"""
import sys
for name in {PACKAGES!r}.split():
    sys.modules[name] = None
import squeezed
squeezed.Session, squeezed.index
from squeezed.cli import main
sys.exit(main(["serve"]))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 2
    line = "serve: it needs the package pydantic_settings; pip install 'squeezed-attention[server]'"
    assert ended.stderr.strip() == f"error: {line}"
