"""Kernels compile for GPUs that are not here, and say what is wrong where they do not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import interpreter  # noqa: F401  first: it tells Triton how to run
import pytest
import torch
from compiling import GPUS
from trees import random_layer
from triton.runtime.errors import OutOfResources

from squeezed import attention as ops
from squeezed.attention.interface import Suffix
from squeezed.attention.triton.decode import launch as decode
from squeezed.attention.triton.prefill import launch as prefill
from squeezed.context.rule import SelectionRule
from squeezed.errors import SqueezedError

PREFILL, DECODE = "prefill bfloat16 128 1 none 1", "decode bfloat16 128 4 second_order 1"
CASES = {
    "A100": [PREFILL, DECODE, f"{DECODE} int4", f"{PREFILL} int8"],
    "RTX 4090": [  # the least shared memory
        "prefill float16 256 2 second_order 1",
        "decode float16 256 4 none 16",
        "clustering bfloat16 128 1 none 1",
        "decode float16 256 4 none 16 int8",
        "prefill float16 256 2 second_order 1 int4",
    ],
    "H200": [
        PREFILL,
        "prefill bfloat16 128 4 second_order 1",
        "prefill float16 64 4 first_order 2",
        "decode bfloat16 96 1 none 1 int8",
        "prefill bfloat16 128 4 second_order 1 int4",
    ],
    "B200": [PREFILL, DECODE, f"{DECODE} int4"],
}


def compiled(gpu, cases):
    """What `compiling.py` found, in a process where kernels are not interpreted."""
    tests = Path(__file__).parents[1]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tests), str(tests.parent)])
    done = subprocess.run(
        [sys.executable, tests / "compiling.py", gpu, *cases],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("gpu", CASES)
def test_kernels_compile_and_fit(gpu):
    for case, found in zip(CASES[gpu], compiled(gpu, CASES[gpu]), strict=True):
        assert max(found["shared"].values()) <= GPUS[gpu][2], case
        if case.startswith("prefill"):  # no length of a prompt must wait for a compiler
            assert len(found["shared"]) == 6 and found["more"] == 0, case
            hopper = gpu == "H200" and "int" not in case.split()[-1]  # which reads plain rows alone
            assert ("hopper_attention_kernel" in found["shared"]) == hopper, case


@pytest.mark.parametrize("operation, rows", [(decode.decode_step, 1), (prefill.prefill, 4)])
@pytest.mark.parametrize(
    "failure, refused",
    [
        (OutOfResources(300000, 232448, "shared memory"), "shared memory"),
        (RuntimeError("Failed to find C compiler. Please specify via CC"), "C compiler"),
        (subprocess.CalledProcessError(1, ["gcc"]), "gcc"),
        (torch.OutOfMemoryError("CUDA out of memory"), None),
    ],
)
def test_a_failure_to_compile_is_one_line(monkeypatch, operation, rows, failure, refused):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(decode, "Step", fail)
    monkeypatch.setattr(prefill, "lookup", fail)
    layer = random_layer(kv_heads=1, nodes=(4, 12), dim=16, tokens=120, dtype=torch.float16)
    query = torch.randn(1, 1, rows, 16, dtype=torch.float16)
    rule = SelectionRule(torch.zeros(2, 1), None, "none", 16)
    with pytest.raises(SqueezedError if refused else torch.OutOfMemoryError) as error:
        operation(query, layer, rule, Suffix(query, query))
    if refused:
        assert refused in str(error.value) and "reference" in str(error.value)
        assert len(str(error.value).splitlines()) == 1


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(ops.IMPLEMENTATIONS, "cpu", "no_such_package.attention")
    with pytest.raises(SqueezedError, match="needs the package no_such_package"):
        ops.implementation("cpu", torch.device("cpu"))
