"""What a run says about itself."""

import json
import sys
from types import SimpleNamespace

import torch

from squeezed.cli import eval as evaluation
from squeezed.measure.accuracy.examples import SuiteOptions
from squeezed.measure.record import about_run, write_record


def called(monkeypatch, *words, module=None):
    monkeypatch.setattr(sys, "argv", list(words))
    spec = None if module is None else SimpleNamespace(name=module)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)


def test_a_record_says_how_where_and_with_what_it_was_made(tmp_path, monkeypatch):
    called(
        monkeypatch, "/home/me/bin/squeezed", "bench", "cpu", "--output", str(tmp_path / "x y.json")
    )
    path = tmp_path / "new" / "cpu.json"
    write_record(path, {"output": tmp_path / "x.json", "turns": 3}, [{"n": 1}], "cpu", "abc")
    record = json.loads(path.read_text())
    assert record["command"] == "squeezed bench cpu --output 'x y.json'"
    assert record["commit"] == "abc" and record["rows"] == [{"n": 1}]
    assert record["settings"] == {"output": "x.json", "turns": 3}
    assert record["threads"] == torch.get_num_threads() and record["processor"]
    assert record["versions"]["torch"] == torch.__version__ and "numba" in record["versions"]
    assert str(tmp_path) not in path.read_text()


def test_a_command_is_one_that_can_be_given_again(monkeypatch):
    called(monkeypatch, "/a/runner.py", "-n", "3", module="package.runner")
    assert about_run("cpu")["command"] == "python -m package.runner -n 3"
    called(monkeypatch, "/a/benchmarks/seeding.py", "model")
    assert about_run("cpu")["command"] == "python seeding.py model"


def test_an_evaluations_header_is_a_runs_record_with_the_suite(monkeypatch):
    called(monkeypatch, "squeezed", "eval", "--seed", "3")
    model = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    found = evaluation.header("niah", "org/model", model, SuiteOptions(seed=3))
    about = about_run("cpu")
    assert found | {"date": 0} == {
        "suite": "niah",
        "model": "model",
        "context_tokens": 8192,
        "seed": 3,
        "data": None,
        "dtype": "float32",
        **about,
        "date": 0,
    }
