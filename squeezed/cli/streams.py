"""Standard streams that can be full, closed, read by nobody, or unable to hold a character."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from squeezed.context.text import encodable, printable
from squeezed.errors import SqueezedError


class ReaderLeft(Exception):
    """The reader of standard output left, as `head` does: there is nothing more to say."""


class _Stream(io.TextIOBase):
    """Another stream's face; `stream` is the one behind it."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]  # as those of io have it
        return getattr(self.stream, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        return getattr(self.stream, "errors", None) or "strict"

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()


class Output(_Stream):
    """Standard output: shows escape sequences instead of sending them, and what cannot be encoded.

    Raises:
        ReaderLeft: nobody reads any more.
        SqueezedError: what was written could not be stored.
    """

    def __init__(self, stream: TextIO, styled: bool = False) -> None:
        super().__init__(stream)
        self.styled = styled

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"expected str, got {type(text).__name__}")
        if not text:  # libraries probe a stream so, and drop what it raises
            return 0
        shown = text if self.styled else printable(text)
        with self._readable_errors():
            self.stream.write(encodable(shown, self.encoding))
        return len(text)

    def flush(self) -> None:
        with self._readable_errors():
            self.stream.flush()

    def with_styles(self) -> Output:
        """The same stream for a table that colours itself; its cells must be `printable`."""
        return Output(self.stream, styled=True)

    @contextmanager
    def _readable_errors(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError as error:
            discard(self.stream)
            raise ReaderLeft from error
        except OSError as error:
            discard(self.stream)
            raise SqueezedError(
                f"stdout: cannot write the result ({error.strerror or error}); free space there or "
                "send it elsewhere"
            ) from error


class Notes(_Stream):
    """Standard error: what it cannot take is dropped, for no work may end for want of a note."""

    def write(self, text: str) -> int:
        try:
            self.stream.write(encodable(text, self.encoding))
        except (OSError, ValueError):
            discard(self.stream)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError):
            discard(self.stream)


@contextmanager
def standard_streams() -> Iterator[None]:
    """Put both in place, and an empty file where a stream was closed, until the end."""
    _open_closed()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Output(sys.stdout), Notes(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def discard(stream: TextIO) -> None:
    """Send all that `stream` still holds, and will be given, nowhere."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _open_closed() -> None:
    """A closed standard stream becomes the null device, so that no other file takes its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            _occupy(number)
            opened = os.open(os.devnull, os.O_RDWR)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(opened, mode, encoding="utf-8"))


def _occupy(number: int) -> None:
    try:
        os.fstat(number)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)
