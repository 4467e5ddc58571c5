"""The prefill kernels compile for an H200, on any machine, and every prompt length shares them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HOPPER_SHARED_BYTES = 232448  # of one program


CASES = [
    "bfloat16 128 4 64 second_order hopper",
    "bfloat16 128 4 64 second_order other",
    "float16 256 1 128 none hopper",
]


@pytest.mark.parametrize("case", CASES)
def test_prefill_compiles_for_hopper_once_for_all_lengths(case):
    tests = Path(__file__).parents[1]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tests), str(tests.parent)])
    done = subprocess.run(
        [sys.executable, tests / "hopper.py", *case.split()],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["shared"]) == 6 and found["more"] == 0
    special = "hopper" in case and "256" not in case  # else the kernel for any GPU
    assert ("hopper_attention_kernel" in found["shared"]) == special
    assert max(found["shared"].values()) <= HOPPER_SHARED_BYTES
