"""`squeezed vllm index`: vLLM reads a document without a server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engines import check_alike

from squeezed.context.storage.directory import load
from squeezed.errors import SqueezedError
from squeezed.vllm import offline

sys.path.insert(0, str(Path(__file__).parents[1]))
from reference import TEXTS
from tiny import document

USUAL = ("--dtype", "float32", "--enforce-eager")


def test_a_context_is_that_of_transformers(place, tmp_path):
    text, out = tmp_path / "one.txt", tmp_path / "out" / "one.sqz"
    text.write_text(document(*TEXTS["one"][:2]))
    environment = dict(os.environ)
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    words = ["-m", "squeezed.cli", "vllm", "index", place / "model", text, "-o", out, "--json"]
    made = subprocess.run(
        [sys.executable, *words, *USUAL],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert made.returncode == 0, made.stderr[-2000:]
    said = json.loads(made.stdout)
    assert said["context"] == str(out)
    assert set(said["seconds"]) == {"prefill", "cluster", "calibrate"}
    check_alike(load(out), load(place / "contexts" / "one.sqz"))
    assert [path.name for path in out.parent.iterdir()] == ["one.sqz"]


@pytest.mark.parametrize(
    "given, why",
    [
        (["--max-model-len", "many"], "max-model-len"),
        (["--no-such-thing", "3"], "no-such-thing"),
        (["--max-model-len", "64"], "the engine takes 64"),
        (["--max-model-len", "1000000"], "max_model_len"),
    ],
)
def test_what_vllm_refuses_is_one_line(place, tmp_path, given, why):
    with pytest.raises(SqueezedError, match=why) as error:
        offline.index(str(place / "model"), "a b c " * 90, tmp_path / "x.sqz", [*USUAL, *given])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
