"""The container file and the compose example name what exists: files, settings, ports, metrics."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from served import serving
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.cli.app import group
from squeezed.server.settings import ServerSettings
from squeezed.system import places

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
OTHER_VARIABLES = (places.VARIABLE,)


def parsed(name):
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def steps():
    """Instructions of the container file, each with its words."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    joined = lines.replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(None, 1)[1]) for line in joined if line.strip()]


def variables():
    return dict(word.split("=", 1) for word in shlex.split(dict(steps())["ENV"]))


@pytest.fixture(scope="module")
def compose():
    return parsed("compose.yaml")


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What `/metrics` says after an answer and an error."""
    root = tmp_path_factory.mktemp("contexts")
    squeezed.index(tiny_model(), tiny_tokenizer(), document(300)).save(root / "one.sqz")
    with serving(root) as served, served.http() as http:
        asked = {"model": "tiny", "prompt": "a", "context": "one", "max_tokens": 2}
        assert http.post("/v1/completions", json=asked).status_code == 200
        assert http.get("/v1/nothing").status_code == 404
        text = http.get("/metrics").text
    return {re.split(r"[{ ]", line)[0] for line in text.splitlines() if line[:1] not in ("#", "")}


def expressions():
    found = []
    board = json.loads((DEPLOY / "grafana" / "dashboards" / "squeezed.json").read_text())
    for panel in board["panels"]:
        found += [(panel["title"], target["expr"]) for target in panel["targets"]]
    return found


def metrics_in(text):
    return set(re.findall(r"\b(?:squeezed|process)_\w+", text))


def test_every_metric_of_the_dashboard_is_told(told):
    assert len(expressions()) > 20
    for title, expression in expressions():
        named = metrics_in(expression)
        assert named and named <= told, (title, named - told)


def test_every_metric_is_on_the_page_and_the_page_names_no_other(told):
    page = (ROOT / "docs" / "serve-monitoring.md").read_text(encoding="utf-8")
    named = metrics_in(page) - {"squeezed_key"}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in named} <= {
        re.sub(r"_(bucket|sum|count)$", "", name) for name in told
    }
    ours = {re.sub(r"_(bucket|sum|count|created)$", "", n) for n in told if n[:8] == "squeezed"}
    ours = {name for name in ours if not {name, f"{name}_total"} & named}
    assert not ours - {name.removesuffix("_total") for name in named}


def test_labels_of_the_dashboard_are_those_of_the_metrics():
    text = " ".join(expression for _, expression in expressions())
    for labels in re.findall(r"by \(([\w, ]+)\)", text):
        assert set(labels.split(", ")) <= {"le", "route", "ended", "status", "kind"}


def test_panels_do_not_overlap_and_read_the_source_that_is_provisioned():
    board = json.loads((DEPLOY / "grafana" / "dashboards" / "squeezed.json").read_text())
    source = parsed("grafana/provisioning/datasources/prometheus.yaml")["datasources"][0]["uid"]
    taken = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells
        assert {
            panel["datasource"]["uid"],
            *(t["datasource"]["uid"] for t in panel["targets"]),
        } == {source}


def test_variables_of_the_container_are_settings(compose):
    named = {**variables(), **compose["services"]["server"]["environment"]}
    ours = {name for name in named if name.startswith("SQUEEZED_")} - set(OTHER_VARIABLES)
    fields = {f"SQUEEZED_{name.upper()}" for name in ServerSettings.model_fields}
    assert ours and ours <= fields


def test_container_starts_with_settings_that_hold(tmp_path, monkeypatch):
    keys = tmp_path / "keys"
    keys.write_text("a-key-of-sixteen-letters")
    environment = {**variables(), **parsed("compose.yaml")["services"]["server"]["environment"]}
    for name, value in environment.items():
        monkeypatch.setenv(name, re.sub(r"\$\{\w+:-(.*)\}", r"\1", str(value)))
    monkeypatch.setenv("SQUEEZED_API_KEY_FILE", str(keys))
    settings = ServerSettings.of({})
    assert settings.host == "0.0.0.0" and settings.model == "demo"
    name, *words = ast.literal_eval(dict(steps())["ENTRYPOINT"])
    assert name == "squeezed" and group().get_command(None, words[0]) is not None


def test_container_copies_files_that_are_there_and_that_the_build_may_see():
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    for _, words in (step for step in steps() if step[0] == "COPY"):
        for name in words.split()[:-1]:
            assert (ROOT / name).exists() and f"!{name}" in ignored, name


def test_container_ends_as_a_user_without_rights_and_has_a_check_of_a_route_without_a_key():
    from squeezed.server.guard import OPEN_PATHS

    order = [step for step, _ in steps()]
    assert dict(steps())["USER"] not in ("root", "0")
    assert order.index("USER") < order.index("ENTRYPOINT")
    words = dict(steps())["HEALTHCHECK"]
    path = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", words)
    assert path[2] in OPEN_PATHS and path[1] == dict(steps())["EXPOSE"]
    assert path[1] == variables()["SQUEEZED_PORT"]
    code = ast.literal_eval(words[words.index("CMD") + 4 :])[-1]
    compile(code, "check", "exec")


def test_parts_of_the_example_find_each_other(compose):
    services = compose["services"]
    port = variables()["SQUEEZED_PORT"]
    (scrape,) = parsed("prometheus.yaml")["scrape_configs"]
    assert scrape["static_configs"][0]["targets"] == [f"server:{port}"] and "server" in services
    secret = scrape["authorization"]["credentials_file"]
    assert secret == variables()["SQUEEZED_API_KEY_FILE"]
    name = Path(secret).name
    assert name in compose["secrets"]
    assert all(name in services[each]["secrets"] for each in ("server", "prometheus"))
    for service in services.values():
        for volume in service["volumes"]:
            place = volume.split(":")[0]
            known = (
                (DEPLOY / place).exists() if place.startswith("./") else place in compose["volumes"]
            )
            assert known, volume
        for mapped in service.get("ports", []):
            assert mapped.startswith("127.0.0.1:")
    boards = parsed("grafana/provisioning/dashboards/squeezed.yaml")["providers"][0]["options"][
        "path"
    ]
    assert any(boards in volume for volume in services["grafana"]["volumes"])
    source = parsed("grafana/provisioning/datasources/prometheus.yaml")["datasources"][0]
    assert source["url"].split("//")[1].split(":")[0] in services


def test_container_is_given_longer_to_end_than_answers_are(compose):
    server = compose["services"]["server"]
    grace = int(server["stop_grace_period"].removesuffix("s"))
    assert grace > float(server["environment"]["SQUEEZED_GRACE_SECONDS"]) + 5


def test_volumes_of_the_container_are_those_that_its_settings_name():
    volumes = ast.literal_eval(dict(steps())["VOLUME"])
    for name in ("HF_HOME", places.VARIABLE, "SQUEEZED_CONTEXTS"):
        assert any(variables()[name].startswith(volume) for volume in volumes), name
