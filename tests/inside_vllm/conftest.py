"""Tests that run vLLM itself, in an environment of their own: `make vllm`."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["*"]

os.environ |= {
    "SQUEEZED_VLLM": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or all engines sit on the first processor
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A model, contexts of it and what Transformers answers, as `reference.py` makes them.

    In a process of its own: vLLM does not start after Numba was imported. `run.sh` makes them once
    for all files of tests, and names the directory in SQUEEZED_PLACE.
    """
    path = tmp_path_factory.mktemp("made") / "place"
    made = os.environ.get("SQUEEZED_PLACE")
    if made:
        return Path(shutil.copytree(made, path))
    subprocess.run([sys.executable, HERE / "reference.py", path], check=True, timeout=600)
    return path


@pytest.fixture(scope="session")
def answers(place):
    return json.loads((place / "answers.json").read_text())
