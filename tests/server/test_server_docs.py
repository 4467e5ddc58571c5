"""Pages about the server keep their word: every block is run, or at least read by who would."""

import os
import re
import shlex
import shutil
import subprocess
import time
import tomllib

import pytest
import yaml
from pages import ADDRESS, PAGES, ROOT, blocks, commands, commands_in, program
from served import serving
from tiny import document

from squeezed.cli.app import group
from squeezed.server.settings import ServerSettings

RUN = ("curl", "job", "openssl")
READ = ("squeezed", "pip", "docker", "cd")
"""Commands that start something: what they name is looked for."""

NAMES = [path.stem for path in PAGES]
IN_ORDER = ("serve-start", "serve-documents", "serve-ask", "serve-monitoring")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    found = tmp_path_factory.mktemp("user")
    (found / "manual.txt").write_text(document(600), encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def served(place):
    with serving(place / "contexts", served_name="demo", answer_tokens=8) as served:
        yield served


def shell(lines, place, base):
    """Run commands in one shell, each of which must succeed; what they wrote."""
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    script = "\n".join(["set -e", *lines]).replace(ADDRESS, base)
    environment = {"PATH": os.environ["PATH"], "KEY": "-", "no_proxy": "*"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=place, capture_output=True, text=True, timeout=120,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, (script, done.stdout[-500:], done.stderr[-2000:])
    return done.stdout


def test_pages_run_from_the_first_command_to_the_last(served, place, monkeypatch, capsys):
    """As a user goes through them: start, add a document, ask, look at the metrics."""
    monkeypatch.chdir(place)
    for name in IN_ORDER:
        text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        scope = {"__name__": "page"}
        for language, block in re.findall(r"```(python|sh)\n(.*?)```", text, re.DOTALL):
            if language == "python":
                exec(compile(block.replace(ADDRESS, served.base), name, "exec"), scope)
                continue
            lines = [line for line in commands_in(block) if program(line) in RUN]
            if lines:
                shell(lines, place, served.base)
        check = globals().get("after_" + name.removeprefix("serve-"))
        if check is not None:
            check(served, scope, capsys.readouterr().out)


def after_documents(served, scope, said):
    assert "done None" in said and "appended: done" in said
    with served.http() as http:
        found = {each["id"]: each for each in http.get("/v1/contexts").json()["data"]}
    assert set(found) == {"manual"} and found["manual"]["pinned"]
    assert found["manual"]["title"] == "The manual" and found["manual"]["source"] == "manual.txt"


def after_ask(served, scope, said):
    assert "manual prefix" in said
    assert scope["second"].squeezed["context"] == "manual"
    assert scope["chunk"].squeezed["bytes_per_token"]["total"] > 0
    assert scope["best"]["start"] < scope["best"]["end"] <= len(scope["text"])


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_known(name):
    for command in commands(name):
        assert program(command) in (*RUN, *READ), command


@pytest.mark.parametrize("name", NAMES)
def test_commands_of_this_package_take_what_the_page_gives_them(name, tmp_path, monkeypatch):
    """Also in running text, and also with the variables before them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys").write_text("a" * 64)
    for block in blocks("serve-start", "toml"):
        (tmp_path / "server.toml").write_text(block)
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    prose = re.findall(r"`(squeezed \w+ [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = [line for line in commands(name) if program(line) == "squeezed"]
    for line in [*lines, *(line for line in prose if "--help" not in line)]:
        words = shlex.split(line)
        start = words.index("squeezed")
        for word in words[:start]:
            monkeypatch.setenv(*word.split("=", 1))
        command, *rest = words[start + 1 :]
        found = group().get_command(None, command)
        assert found is not None, line
        context = found.make_context(command, list(rest))
        if command == "serve":
            given = {k: v for k, v in context.params.items() if v is not None and k != "config"}
            settings = ServerSettings.of(given, context.params["config"])
            assert settings.engine == "vllm" or not context.args, line
        for word in words[:start]:
            monkeypatch.delenv(word.split("=")[0])


@pytest.mark.parametrize("name", NAMES)
def test_extras_options_and_settings_that_pages_name_exist(name):
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for named in re.findall(r"squeezed-attention\[([\w,]+)\]", text):
        assert set(named.split(",")) <= set(extras)
    ours = {f"--{field.replace('_', '-')}" for field in ServerSettings.model_fields} | {"--config"}
    for flag in re.findall(r"`(--[a-z-]+)", text):
        assert flag in ours | {"--index-pause", "--help", "--build-arg"}, flag
    for name in re.findall(r"\bSQUEEZED_([A-Z_]+)", text):
        assert name.lower() in ServerSettings.model_fields, name


def test_settings_file_of_the_page_holds(tmp_path):
    (block,) = blocks("serve-start", "toml")
    (tmp_path / "server.toml").write_text(block)
    settings = ServerSettings.of({}, tmp_path / "server.toml")
    assert settings.budget == 0.05 and settings.port == 8001


def test_scrape_of_the_page_is_that_of_the_example():
    (block,) = blocks("serve-monitoring", "yaml")
    page = yaml.safe_load(block)["scrape_configs"][0]
    example = yaml.safe_load((ROOT / "deploy" / "prometheus.yaml").read_text())["scrape_configs"][0]
    assert {k: v for k, v in page.items() if k == "metrics_path"} == {"metrics_path": "/metrics"}
    assert page.keys() == example.keys()


def test_alarms_of_the_page_are_whole_expressions():
    for line in "\n".join(blocks("serve-monitoring", "promql")).splitlines():
        assert line.count("(") == line.count(")") and re.search(r" > [\d.]+$", line), line


PROXY = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


@pytest.fixture
def proxied(tmp_path):
    """The page's nginx before a server with keys, without the certificate; its address."""
    if PROXY is None:
        pytest.skip("needs nginx")
    keys = tmp_path / "keys"
    keys.write_text("a-key-of-sixteen-letters")
    (block,) = blocks("serve-proxy", "nginx")
    with serving(tmp_path / "contexts", api_key_file=keys, max_body_mb=1) as served:
        plain = re.sub(r"\n\s*ssl_.*", "", block).replace("8000", served.base.rpartition(":")[2])
        plain = plain.replace("443 ssl", f"unix:{tmp_path}/socket").replace("64m", "1m")
        (tmp_path / "nginx.conf").write_text(
            f"daemon off; pid {tmp_path}/pid; error_log stderr;\nevents {{}}\nhttp {{\n"
            f"access_log off; client_body_temp_path {tmp_path}/body;\n"
            f"proxy_temp_path {tmp_path}/proxy; fastcgi_temp_path {tmp_path}/fast;\n"
            f"uwsgi_temp_path {tmp_path}/uwsgi; scgi_temp_path {tmp_path}/scgi;\n{plain}}}\n"
        )
        log = open(tmp_path / "log", "wb")  # noqa: SIM115
        words = [PROXY, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")]
        process = subprocess.Popen(words, stderr=log)
        try:
            assert served.until((tmp_path / "socket").exists), (tmp_path / "log").read_text()
            yield tmp_path / "socket"
        finally:
            process.terminate()
            process.wait(30)
            log.close()


def test_proxy_of_the_page_hands_pieces_on_as_they_come(proxied):
    import httpx

    transport = httpx.HTTPTransport(uds=str(proxied))
    headers = {"Authorization": "Bearer a-key-of-sixteen-letters"}
    with httpx.Client(
        transport=transport, base_url="http://documents.example.org", timeout=60, headers=headers
    ) as http:
        assert http.get("/health").json() == {"status": "ok"}
        own = {"Origin": "https://documents.example.org"}
        assert http.get("/v1/models", headers=own).status_code == 200
        assert http.get("/v1/models", headers={"Origin": "https://other.org"}).status_code == 403
        assert http.post("/v1/completions", content=b"x" * (2 << 20)).status_code == 413
        body = {"model": "tiny", "prompt": "a", "max_tokens": 200, "stream": True}
        times = []
        with http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            for _ in answer.iter_raw():
                times.append(time.monotonic())
    assert len(times) > 20 and times[len(times) // 2] < times[-1] - 0.02
