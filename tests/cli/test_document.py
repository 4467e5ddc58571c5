"""A document from a file, a pipe, a device or standard input."""

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from squeezed.cli import document
from squeezed.cli.document import is_stdin, read_document
from squeezed.errors import SqueezedError

TEXT = "one two three\n" * 20_000
"""More than a pipe holds."""


@pytest.fixture
def pipe(tmp_path, monkeypatch):
    monkeypatch.setattr(document, "WRITER_SECONDS", 2.0)
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_a_pipe_is_read_whole_whenever_its_writer_comes(pipe, seconds):
    def write():
        time.sleep(seconds)
        with open(pipe, "w") as file:
            file.write(TEXT[:7])
            file.flush()
            time.sleep(seconds)
            file.write(TEXT[7:])

    writer = threading.Thread(target=write)
    writer.start()
    assert read_document(pipe) == TEXT
    writer.join()


def test_a_pipe_of_a_shell_is_read_by_its_number():
    read, write = os.pipe()
    writer = threading.Thread(target=lambda: os.fdopen(write, "w").write(TEXT))
    writer.start()
    assert read_document(Path(f"/dev/fd/{read}")) == TEXT
    writer.join()
    os.close(read)


def test_a_pipe_without_a_writer_is_refused(pipe, monkeypatch):
    monkeypatch.setattr(document, "WRITER_SECONDS", 0.2)
    with pytest.raises(SqueezedError, match="is a pipe to which nobody writes"):
        read_document(pipe)


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", "/dev/urandom"])
def test_devices_are_refused_unread(name):
    with pytest.raises(SqueezedError, match=f"{name} is a device; name a text file"):
        read_document(Path(name))


def test_sockets_and_missing_files_are_refused(tmp_path):
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(tmp_path / "s"))
        for name in ("s", "none", "x" * 300, "a\0b"):
            with pytest.raises(SqueezedError, match="document: cannot read"):
                read_document(tmp_path / name)


def test_stdin_has_several_names():
    named = ("-", "/dev/stdin", "/dev//stdin", "/dev/fd/0", "/proc/self/fd/0")
    assert all(is_stdin(Path(name)) for name in named)
    assert not any(is_stdin(Path(name)) for name in ("/dev/fd/1", "stdin", "dev/stdin"))
