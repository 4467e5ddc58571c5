"""Files of a saved context, read once into private memory: what was checked is what is used.

A directory that another process replaces or clears after it was opened stays readable to the end:
its files are held open until each was read. They are never mapped, for a mapping shows what is
written into a file after the check, and ends the process when the file is cut.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from squeezed.context.storage.names import MANIFEST
from squeezed.errors import ContextFileError, shown

PIECE = 1 << 26
"""Bytes that are read at once, and hashed while the next ones are read."""
LARGE = 1 << 24
"""Bytes from which large pages are worth asking for."""
Mark = tuple[int, ...]


class HeldDirectory:
    """An open directory, and descriptors of those files in it that were asked for."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.abspath(path))
        self.held: dict[str, int] = {}
        self.seen: Mark | None = None
        self.descriptor = -1
        self.descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def hold(self, names: Iterable[str]) -> None:
        """Open files, to be read later; when descriptors run out, the rest is opened then."""
        for name in names:
            try:
                self.held[name] = self._open(name)
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    return
                raise

    def names(self) -> list[str]:
        """What lies in the directory."""
        return os.listdir(self.descriptor)

    def size(self, name: str) -> int:
        """Bytes of a file; -1 if it is not there, or is not a regular file."""
        try:
            found = os.fstat(self.held[name]) if name in self.held else self._stat(name)
        except FileNotFoundError:
            return -1
        return found.st_size if stat.S_ISREG(found.st_mode) else -1

    def read(self, name: str, most_bytes: int) -> tuple[Tensor, Callable[[], str]]:
        """All of a file, `[bytes]` uint8, and what waits for its SHA-256; at most `most_bytes + 1`
        bytes of it."""
        if name not in self.held:
            self.held[name] = self._open(name)
        self._refuse_deleted(self.held[name])
        if name == MANIFEST:
            self.seen = _mark(os.fstat(self.held[name]))
        content = _content(self.held[name], most_bytes + 1)
        os.close(self.held.pop(name))
        return content

    def is_current(self) -> bool:
        """Whether the description that was read, if any was, is still the one at the path."""
        try:
            found = os.stat(self.path / MANIFEST)
        except OSError:
            return self.seen is None
        if not stat.S_ISREG(found.st_mode):  # it cannot have replaced a file
            return self.seen is None
        return _mark(found) == (self.seen or self._mark_here())

    def _mark_here(self) -> Mark | None:
        """Of a description that could not be read."""
        try:
            return _mark(self._stat(MANIFEST))
        except OSError:
            return None

    def _open(self, name: str) -> int:
        """Never waits, as opening a pipe would."""
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        return os.open(name, flags, dir_fd=self.descriptor)

    def _stat(self, name: str) -> os.stat_result:
        return os.stat(name, dir_fd=self.descriptor)

    def _refuse_deleted(self, descriptor: int) -> None:
        """A context that was replaced answers on; one that was deleted is not brought back."""
        if not os.fstat(descriptor).st_nlink and not os.path.lexists(self.path):
            raise ContextFileError(
                f"{shown(self.path)}: the context was deleted after it was opened and before all of"
                " it was read; index the document again"
            )

    def __reduce__(self) -> tuple[type[HeldDirectory], tuple[Path]]:
        return HeldDirectory, (self.path,)

    def __del__(self) -> None:
        for descriptor in (*self.held.values(), self.descriptor):
            if descriptor >= 0:
                os.close(descriptor)


def _mark(found: os.stat_result) -> Mark:
    return found.st_dev, found.st_ino, found.st_size, found.st_ctime_ns


def _content(descriptor: int, most_bytes: int) -> tuple[Tensor, Callable[[], str]]:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    size = min(found.st_size, most_bytes)
    content, digest = _memory(size), hashlib.sha256()
    pieces = _pieces(descriptor, content.numpy().data)
    if size <= PIECE:
        for piece in pieces:
            digest.update(piece)
        return content, digest.hexdigest
    hasher = ThreadPoolExecutor(1, thread_name_prefix="checksum")
    for piece in pieces:
        hasher.submit(digest.update, piece)
    last = hasher.submit(digest.hexdigest)
    hasher.shutdown(wait=False)
    return content, last.result


def _memory(size: int) -> Tensor:
    """Bytes of this process alone, `[size]` uint8, in large pages where the system has them:
    much of the time of reading into new memory goes into handing it out page by page."""
    if size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _pieces(descriptor: int, view: memoryview) -> Iterator[memoryview]:
    """The parts of `view`, each as soon as the file's bytes are in it.

    Read by their places in the file: processes that were forked share a descriptor's own.
    """
    done = 0
    while done < len(view):
        count = _read_at(descriptor, view[done : done + PIECE], done)
        if not count:
            raise OSError(errno.EIO, "it became shorter while it was read")
        yield view[done : done + count]
        done += count


def _read_at(descriptor: int, view: memoryview, place: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], place)
    found = os.pread(descriptor, len(view), place)  # older systems
    view[: len(found)] = found
    return len(found)
