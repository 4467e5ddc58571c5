"""A cache of kernels that is missing, damaged, old or another function's never changes a result."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from numba import config

from squeezed.attention.cpu import compiled as compiling
from squeezed.errors import SqueezedError


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "kernel_directory", lambda: tmp_path / "kernels")
    return tmp_path / "kernels"


def double(x):
    return x * 2


def fresh():
    """The kernel as a new process would see it."""
    return compiling.compiled(double)


def hits(kernel):
    return sum(kernel.stats.cache_hits.values())


def emptied(path):
    path.write_bytes(b"")


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def nonsense(path):
    path.write_bytes(b"\x80\x05nonsense")


def flipped(path):
    held = bytearray(path.read_bytes())
    held[len(held) // 2] ^= 1
    path.write_bytes(held)


def removed(path):
    path.unlink()


def test_kernel_is_compiled_once(directory):
    assert fresh()(3) == 6
    again = fresh()
    assert again(3) == 6 and hits(again) == 1
    assert {path.suffix for path in directory.iterdir()} == {".nbi", ".nbc"}


@pytest.mark.parametrize("damage", [emptied, cut, nonsense, flipped, removed])
@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
def test_damaged_file_is_compiled_again_and_replaced(directory, suffix, damage):
    assert fresh()(3) == 6
    (path,) = (path for path in directory.iterdir() if path.suffix == suffix)
    damage(path)
    mended = fresh()
    assert mended(3) == 6 and hits(mended) == 0
    again = fresh()
    assert again(3) == 6 and hits(again) == 1


def test_kernel_of_another_type_under_its_name_does_not_run(directory):
    kernel = fresh()
    assert kernel(3) == 6 and kernel(1.25) == 2.5
    first, second = sorted(path for path in directory.iterdir() if path.suffix == ".nbc")
    shutil.copy(first, second)
    again = fresh()
    assert again(1.25) == 2.5 and again(3) == 6


def test_kernels_of_other_sources_are_not_used(directory, monkeypatch):
    assert fresh()(3) == 6
    monkeypatch.setattr(compiling, "sources_digest", lambda: b"changed")
    kernel = fresh()
    assert kernel(3) == 6 and hits(kernel) == 0


def test_without_a_place_kernels_are_compiled_in_every_run(monkeypatch):
    monkeypatch.setattr(compiling, "kernel_directory", lambda: None)
    assert fresh()(np.float32(1.5)) == 3


def test_place_that_is_lost_meanwhile_does_no_harm(directory):
    kernel = fresh()
    directory.write_text("a file where the directory was")
    assert kernel(3) == 6


def test_nothing_is_interpreted_instead(monkeypatch):
    monkeypatch.setattr(config, "DISABLE_JIT", 1)
    with pytest.raises(SqueezedError, match="NUMBA_DISABLE_JIT"):
        fresh()


@pytest.mark.parametrize("variable", ["NUMBA_NUM_THREADS=0", "NUMBA_DISABLE_JIT=1"])
def test_settings_under_which_numba_does_not_work_are_one_line(variable):
    program = """
import torch
from squeezed.errors import SqueezedError
from squeezed.attention import implementation
try:
    implementation("auto", torch.device("cpu"))
except SqueezedError as error:
    print(error)
"""
    name, value = variable.split("=")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), name: value}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    line = done.stdout.strip()
    assert "NUMBA_" in line and "'reference'" in line and "\n" not in line


@pytest.mark.parametrize("chosen", ["", "here"])
def test_kernels_lie_where_the_environment_says_or_beside_the_sources(
    tmp_path, monkeypatch, chosen
):
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / chosen) if chosen else "")
    compiling.kernel_directory.cache_clear()
    try:
        found = compiling.kernel_directory()
        monkeypatch.setattr(compiling, "SOURCES", tmp_path / "file")  # cannot be written
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("SQUEEZED_CACHE", str(tmp_path / "cache"))
        compiling.kernel_directory.cache_clear()
        elsewhere = compiling.kernel_directory()
    finally:
        compiling.kernel_directory.cache_clear()
    if chosen:
        assert found.parent == elsewhere.parent == tmp_path / chosen
    else:
        assert found.name == "__pycache__" and elsewhere.parent == tmp_path / "cache"
