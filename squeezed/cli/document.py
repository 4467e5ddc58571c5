"""The text of a document from a file, a pipe or standard input."""

from __future__ import annotations

import os
import stat
import sys
import time
from contextlib import suppress
from pathlib import Path

from squeezed.context.text import text_of_file
from squeezed.errors import SqueezedError
from squeezed.system.failures import cause_of

STDIN = ("/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
WRITER_SECONDS = 10.0
"""How long a named pipe may have no writer before it is refused."""
LOOK_SECONDS = 0.05


def is_stdin(path: Path) -> bool:
    """Whether a name means standard input: `-`, or what a system calls it."""
    return str(path) == "-" or os.path.normpath(path) in STDIN


def read_document(path: Path) -> str:
    """The text of a file, or of standard input.

    Raises:
        SqueezedError: missing, unreadable, empty, not UTF-8 text, a device, or a pipe that nobody
            writes to.
    """
    source = "stdin" if is_stdin(path) else str(path)
    try:
        data = sys.stdin.buffer.read() if source == "stdin" else _content(path)
    except SqueezedError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise SqueezedError(
            f"document: cannot read {source} ({cause_of(error)}); name a text file or a saved "
            "context"
        ) from error
    text = text_of_file("document", data, source)
    if not text.strip():
        raise SqueezedError(f"document: {source} is empty; give some text")
    return text


def _content(path: Path) -> bytes:
    """All of a file or pipe. Opening one does not wait: who names a pipe may not know it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISFIFO(kind):
            first = _first_of_pipe(descriptor, path)
            os.set_blocking(descriptor, True)
            return first + file.read()
        if (stat.S_ISCHR(kind) or stat.S_ISBLK(kind)) and not file.isatty():
            raise SqueezedError(f"document: {path} is a device; name a text file")
        os.set_blocking(descriptor, True)
        return file.read()


def _first_of_pipe(descriptor: int, path: Path) -> bytes:
    """What a pipe holds as soon as somebody has it open to write; nothing if it waits yet."""
    until = time.monotonic() + WRITER_SECONDS
    while time.monotonic() < until:
        with suppress(BlockingIOError):
            held = os.read(descriptor, 1 << 16)
            if held:
                return held
            time.sleep(LOOK_SECONDS)  # nobody writes, yet
            continue
        return b""
    raise SqueezedError(
        f"document: {path} is a pipe to which nobody writes; start what writes to it, or name a "
        "text file"
    )
