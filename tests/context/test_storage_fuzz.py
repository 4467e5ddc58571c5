"""3,000 altered contexts: each answers, or is refused in one line; none ends the process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.context.prompt import PromptTemplate

CASES, SEED = 1000, 1
FUZZER = Path(__file__).with_name("fuzzing.py")


@pytest.mark.parametrize("rows", ["plain", "int4", "int8"])
def test_altered_contexts_answer_or_are_refused(tmp_path, rows):
    config = squeezed.IndexConfig(
        clustering=squeezed.ClusteringConfig(levels=(0.05, 0.2), pinned_last=20),
        budgets=(0.1, 0.3),
        rows=rows,
    )
    text = document(160)
    plain = PromptTemplate.plain()
    context = squeezed.index(tiny_model("gemma3"), tiny_tokenizer(), text, config, plain)
    saved = context.save(tmp_path / "manual.sqz")
    done = subprocess.run(
        [sys.executable, str(FUZZER), str(saved), str(CASES), str(SEED)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert set(counts) <= {"refused", "same", "other"} and sum(counts.values()) == CASES, counts
    assert counts["refused"] > CASES / 2 and counts["same"], counts
