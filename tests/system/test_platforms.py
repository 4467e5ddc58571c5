"""Systems that lack what Linux has: each step has another way, and Windows is refused in one line.

Their absence is simulated; nothing here ran on them.
"""

import errno
import mmap
import os
import subprocess
import sys
import types

import pytest
import torch
from made import made_context, same_context

from squeezed.context.storage import names
from squeezed.context.storage.directory import load
from squeezed.context.storage.saving import prove_writable, save
from squeezed.costs import memory
from squeezed.system import files, forks, platforms

BEGINNINGS = {
    "windows": "import sys; sys.platform = 'win32'",
    "no directory descriptors": "import os; os.supports_dir_fd = set()",
    "no directories to open": "import os; del os.O_DIRECTORY",
}


def python(*lines):
    return subprocess.run(
        [sys.executable, "-c", "; ".join(lines)], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("system", BEGINNINGS)
@pytest.mark.parametrize("use", ["import squeezed", "from squeezed.config import IndexConfig"])
def test_import_on_an_unsupported_system_ends_with_one_line(system, use):
    ended = python(BEGINNINGS[system], use)
    assert ended.returncode == 1 and not ended.stdout
    assert ended.stderr.splitlines()[-1] == f"squeezed.errors.SqueezedError: {platforms.REFUSAL}"
    assert "During handling" not in ended.stderr and "WSL" in platforms.REFUSAL


@pytest.mark.parametrize(
    "program",
    [
        "sys.argv = [r'/usr/bin/squeezed', 'ask']",
        "sys.argv = ['squeezed.exe', '--help']",
        "sys.argv = ['squeezed-script.py']",
        "sys.argv = ['-m']; sys.orig_argv = ['python', '-m', 'squeezed.cli', 'index', 'a.txt']",
    ],
)
def test_command_on_an_unsupported_system_is_one_line(program):
    ended = python(BEGINNINGS["windows"], program, "import squeezed.cli")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"error: {platforms.REFUSAL}\n"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """What macOS lacks of Linux is missing; its machines are known by name and network card."""
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    monkeypatch.setattr(files, "OF_DESCRIPTOR", str(tmp_path / "proc/self/fd"))
    monkeypatch.setattr(files, "BOOT", tmp_path / "proc/boot_id")
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    files.kernel.cache_clear()
    yield tmp_path / "place"
    files.kernel.cache_clear()


def test_contexts_are_saved_and_read_without_what_linux_has(elsewhere):
    elsewhere.mkdir()
    target, old, new = elsewhere / "c.sqz", made_context(0), made_context(1)
    assert files.unnamed(elsewhere) is None and not files.may_open(1)
    prove_writable(target)
    assert os.listdir(elsewhere) == []
    for context in (old, new):
        save(context, target)
        assert same_context(load(target), context)
        assert os.listdir(elsewhere) == ["c.sqz"]
    assert len(os.listdir(target)) == len(new.layers) + 2


def test_a_dead_saver_is_known_without_what_linux_has(elsewhere):
    elsewhere.mkdir()
    target = save(made_context(0), elsewhere / "c.sqz")
    child = os.fork()
    if child == 0:
        files.give_name = files.write_all = lambda *args: os._exit(7)
        try:
            save(made_context(1), target)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert any(names.WORK in name for name in os.listdir(target))
    save(made_context(1), target)
    assert len(os.listdir(target)) == len(made_context(1).layers) + 2


def test_machines_without_a_boot_number_are_told_apart(elsewhere, monkeypatch):
    def known():
        files.kernel.cache_clear()
        assert names.UNDER_WAY.fullmatch(names.WORK + names.new_token())
        return files.kernel()

    here = known()
    assert known() == here
    monkeypatch.setattr(files.uuid, "getnode", lambda: 7)
    other_card = known()
    monkeypatch.setattr(files.socket, "gethostname", lambda: "caf\udce9")
    assert len({here, other_card, known()}) == 3


def test_memory_is_known_and_forks_are_let_be_without_what_linux_has(elsewhere, monkeypatch):
    assert memory.free_bytes(torch.device("cpu")) >= os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr("builtins.open", lambda *args, **kwargs: _missing())
    assert forks._gnu_openmp_libraries() == set()


def _missing():
    raise FileNotFoundError(errno.ENOENT, "No such file or directory")


@pytest.mark.parametrize("works", [True, False])
def test_drives_that_are_asked_to_write_are_asked_where_that_works(works, tmp_path, monkeypatch):
    asked, flushed = [], []

    def fcntl(descriptor, command):
        asked.append(command)
        if not works:
            raise OSError(errno.ENOTSUP, "Operation not supported")

    system = types.SimpleNamespace(F_FULLFSYNC=51, fcntl=fcntl)
    monkeypatch.setattr(files, "fcntl", system)
    monkeypatch.setattr(os, "fsync", flushed.append)
    files.flush(tmp_path)
    assert asked == [51] and len(flushed) == (not works)
