"""Streams of the command line that are full, closed, left, or of another encoding; interrupts."""

import io
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from squeezed.cli import main
from squeezed.cli.console import json_text
from squeezed.cli.interrupts import Interrupts
from squeezed.cli.streams import Notes, Output, ReaderLeft
from squeezed.errors import SqueezedError


class Failing(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


def ascii_stream():
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)


def test_output_shows_escape_sequences_and_what_it_cannot_encode():
    stream = ascii_stream()
    print("\x1b]0;title\x07 文", file=Output(stream))
    assert stream.buffer.getvalue() == b"\\x1b]0;title\\x07 \\u6587\n"


def test_output_tells_a_reader_that_left_from_a_full_disk():
    with pytest.raises(ReaderLeft):
        Output(Failing(BrokenPipeError())).write("x")
    with pytest.raises(SqueezedError, match=r"stdout: .*No space"):
        Output(Failing(OSError(28, "No space left on device"))).write("x")


def test_notes_show_what_they_cannot_encode():
    for stream in (ascii_stream(), io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)):
        print("error: \udcff.txt", file=Notes(stream))
        assert stream.buffer.getvalue() == b"error: \\udcff.txt\n"


def test_notes_never_end_the_work():
    print("note", file=Notes(Failing(OSError(28, "No space left on device"))), flush=True)


def test_json_is_json_whatever_it_holds(monkeypatch):
    record = {"a": float("nan"), "b": [float("inf"), 1.5], "c": "文\x9b\x7f\x1b\ud83d"}
    for stream in (io.StringIO(), ascii_stream()):
        monkeypatch.setattr(sys, "stdout", stream)
        text = json_text(record)
        assert json.loads(text) == {"a": None, "b": [None, 1.5], "c": record["c"]}
        assert not any(letter in text for letter in "\x9b\x7f\x1b\ud83d")


def shell(command):
    """Exit status, stdout and stderr of a shell command in which `squeezed` is this package's."""
    program = f'squeezed() {{ "{sys.executable}" -m squeezed.cli "$@"; }}; '
    done = subprocess.run(["bash", "-c", program + command], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("command", "status", "lines"),
    [
        ("squeezed --help > /dev/full", 2, 1),
        ("squeezed --help >&-", 0, 0),
        ("squeezed --help <&- 2>&-", 0, 0),
        ("squeezed squash 2> /dev/full", 2, 0),
        ("squeezed --help | true; exit ${PIPESTATUS[0]}", 0, 0),
    ],
)
def test_streams_that_are_full_closed_or_left(command, status, lines):
    found, _, err = shell(command)
    assert found == status and len(err.splitlines()) == lines, err


@pytest.fixture
def pressed():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_presses_that_follow_at_once_do_not_interrupt_the_cleaning_up(pressed):
    with Interrupts(last=False) as interrupts:
        try:
            pressed()
        except KeyboardInterrupt:
            pressed()
        assert interrupts.seen
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupt_that_a_library_swallowed_comes_again(pressed):
    class Swallowing:
        def __del__(self):
            pressed()

    with pytest.raises(KeyboardInterrupt), Interrupts(last=False):
        Swallowing()
        threading.Event().wait(5)


def test_interrupt_after_the_work_is_ignored(pressed):
    with Interrupts(last=True):
        pass
    pressed()


def test_a_working_directory_that_is_gone_is_one_line(capsys, tmp_path, monkeypatch):
    def gone():
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "getcwd", gone)
    assert main(["plan", "demo"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: directory: ") and err.count("\n") == 1


def test_fault_of_this_package_is_one_line_too(capsys, monkeypatch):
    from squeezed.cli import main
    from squeezed.costs import shape

    monkeypatch.setattr(shape, "model_shape", lambda config: 1 / 0)
    monkeypatch.setattr("squeezed.hf.loading.load_config", lambda *words: None)
    assert main(["plan", "x"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ZeroDivisionError") and len(err.splitlines()) == 1


def test_bytes_that_are_no_text_are_one_line(tmp_path):
    (tmp_path / "manual.txt").write_text("alpha")
    command = [sys.executable, "-m", "squeezed.cli", "ask", str(tmp_path / "manual.txt")]
    done = subprocess.run([*command, b"caf\xe9?"], capture_output=True, env=os.environ)
    assert done.returncode == 2 and done.stderr.startswith(b"error: question: ")
    assert len(done.stderr.splitlines()) == 1
