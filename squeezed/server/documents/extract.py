"""An uploaded file -> its text; what is not plain is read in a process of its own, with limits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from squeezed.context.text import text_of_file
from squeezed.errors import SqueezedError, shown
from squeezed.server.documents.child import TOO_MUCH

CHILD = Path(__file__).with_name("child.py")
ENDINGS = {".htm": "html", ".html": "html", ".xhtml": "html", ".pdf": "pdf", ".docx": "docx"}
BEGINNINGS = ((b"%PDF-", "pdf"), (b"PK\x03\x04", "docx"))
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Limits:
    """What reading a file may take."""

    seconds: int = 60
    memory_mb: int = 2048
    characters: int = 1 << 26


def kind_of(file: str, data: bytes) -> str:
    """`plain`, `html`, `pdf` or `docx`, by how the file begins and what it is called."""
    for beginning, kind in BEGINNINGS:
        if data.startswith(beginning):
            return kind
    ending = Path(file.replace("\\", "/")).suffix.lower()
    found = ENDINGS.get(ending, "plain")
    if found in ("pdf", "docx"):
        raise SqueezedError(f"file: {shown(file)} is no {found.upper()} file; check what it holds")
    return found


def text_of_upload(
    file: str, path: Path, limits: Limits, look: Callable[[], None] = lambda: None
) -> str:
    """The text of an uploaded file.

    Args:
        file: what the client calls it.
        path: where its bytes lie.
        look: called now and then; raises to end the work.

    Raises:
        SqueezedError: another kind of file, a damaged one, or one that takes too much.
    """
    data = path.read_bytes()
    kind = kind_of(file, data)
    if kind == "html":
        text_of_file("file", data, shown(file))  # says so if it is not UTF-8
    text = text_of_file("file", data, shown(file)) if kind == "plain" else ""
    del data
    if kind != "plain":
        text = _in_child(kind, file, path, limits, look)
    if len(text) > limits.characters:
        raise SqueezedError(f"file: {shown(file)} holds more text than is allowed; cut it in two")
    if not text.strip():
        raise SqueezedError(f"file: {shown(file)} holds no text; give one with words in it")
    return text


def _in_child(kind: str, file: str, path: Path, limits: Limits, look: Callable[[], None]) -> str:
    words = [kind, path, limits.seconds, limits.memory_mb, limits.characters]
    command = [sys.executable, "-I", str(CHILD), *map(str, words)]
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as wrong:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said.fileno(), stderr=wrong.fileno(),
            env={"PATH": os.defpath}, start_new_session=True,
        )  # fmt: skip
        try:
            status = _ended(child, limits.seconds, look)
        finally:
            _kill(child)
        if status == 0:
            said.seek(0)
            return said.read().decode("utf-8")
        wrong.seek(0)
        raise SqueezedError(_why(file, status, wrong.read(2000), limits))


def _ended(child: subprocess.Popen, seconds: int, look: Callable[[], None]) -> int | None:
    """The child's status, or `None` if it did not end in time."""
    for _ in range(int(seconds / POLL_SECONDS) + 1):
        look()
        try:
            return child.wait(POLL_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    return None


def _kill(child: subprocess.Popen) -> None:
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _why(file: str, status: int | None, said: bytes, limits: Limits) -> str:
    name = shown(file)
    if status is None or status in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"file: {name} could not be read in {limits.seconds} s; give its text instead"
    lines = said.decode("utf-8", "replace").strip().splitlines()
    last = shown(lines[-1]) if lines else "its reader ended"
    if status == TOO_MUCH:
        return f"file: {name} takes too much to read ({last}); give its text instead"
    return f"file: {name} cannot be read ({last}); check it, or give its text instead"
