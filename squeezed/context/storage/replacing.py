"""How the files of a context get their names: all at once, and an older context's only then.

Files are written where no name leads to them, so a process that is killed leaves nothing. Names are
given when all is on the disk. A new context gets them in a directory that then gets the target's
name. Over an older one they are given beside its files; then the new description takes the name of
the older one, in one step, and what that listed is cleared. Where a file must have a name from the
start, it gets it in the same places.

The description on its way is locked by its maker. The kernel takes the lock back when the maker
ends, however it ends, so every later save knows what the dead have left (`clearing`).
"""

from __future__ import annotations

import errno
import functools
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from squeezed.context.storage.clearing import clear, remove
from squeezed.context.storage.names import MANIFEST, WORK, layer_file, marked, new_token
from squeezed.system import files

ATTEMPTS = 1000
TAKEN = (errno.ENOTEMPTY, errno.EEXIST)
CLOSED = -1


@dataclass
class NewFile:
    """A file that is written: open, perhaps without a name, or closed, at one."""

    descriptor: int
    path: Path | None = None

    def move(self, path: Path) -> None:
        """Give the file its only, or another, name."""
        if self.path is None:
            files.give_name(self.descriptor, path)
        elif self.path != path:
            os.rename(self.path, path)
        self.path = path

    def close(self) -> None:
        descriptor, self.descriptor = self.descriptor, CLOSED
        if descriptor != CLOSED:
            os.close(descriptor)


@dataclass(frozen=True)
class Place:
    """Where names are given: in the target, or in a new directory beside it.

    Attributes:
        description: what becomes `context.json`, locked.
    """

    path: Path
    description: NewFile


class Work:
    """One save: `open` files and write them, then `publish`; `end` in any case.

    Args:
        target: where the context shall lie, resolved.
        count: how many files will be opened.
    """

    def __init__(self, target: Path, count: int = 0) -> None:
        self.target, self.count, self.token = target, count, new_token()
        self.files: dict[str, NewFile] = {}
        self.place: Place | None = None
        self.opened: list[NewFile] = []
        self.made: list[Path] = []
        self.parents: list[Path] = []

    @contextmanager
    def open(self, name: str) -> Iterator[int]:
        """The descriptor of a new file, which is on the disk after the block."""
        file = self.files[name] = self._opened(name)
        yield file.descriptor
        files.flush_open(file.descriptor)
        if file.path is not None:
            file.close()

    def publish(self, check: Callable[[Path], object], describe: Callable[[str], bytes]) -> None:
        """Let the target be the context of these files.

        Args:
            check: raises for a directory at the target that must stay.
            describe: text of the description, given the token in the files' names.
        """
        describe = functools.cache(describe)
        for _ in range(ATTEMPTS):
            over = os.path.lexists(self.target)
            if over:
                check(self.target)
            describe(self.token if over else "")  # while there is nothing that a kill would leave
            place = self.begin()
            if place.path == self.target or os.path.lexists(self.target):
                check(self.target)
                self._name_all(place, self.target, describe(self.token), self.token)
                os.replace(self.target / f"{WORK}{self.token}", self.target / MANIFEST)
                files.flush(self.target)
                return
            self._name_all(place, place.path, describe(""), "")
            place.description.move(place.path / MANIFEST)
            files.flush(place.path)
            if self._renamed(place.path):
                return
        raise OSError(errno.EBUSY, "too many other processes save there")

    def prove(self) -> None:
        """Raise `OSError` unless the target can be made, or its description replaced.

        Room on the disk is not proved.
        """
        with suppress(FileNotFoundError):  # nothing there
            _prove_replaceable(self.target)
        place = self.begin()
        os.close(files.named(place.path / layer_file(0, self.token)))
        if place.path != self.target:
            (place.path / self.target.name).mkdir()

    def begin(self) -> Place:
        """The place; made, with the locked description in it, when first asked for."""
        gone = OSError(errno.EBUSY, "its temporary files are taken away by another process")
        for _ in range(ATTEMPTS):
            if self.place is not None:
                return self.place
            try:
                directory = self._directory()
                path = directory / f"{WORK}{self.token}"
                file = NewFile(files.named(path), path)
                self.opened.append(file)
                locked = files.lock(file.descriptor)
                if locked is not False and files.leads_to(path, file.descriptor):
                    self.place = Place(directory, file)
                    continue
                file.close()
            except FileNotFoundError as error:  # cleared before it was locked, or nothing can be
                gone = error
            self.token = new_token()
        raise gone

    def end(self) -> None:
        """Clear what this save, and dead ones, left. May be called again."""
        for file in (*self.files.values(), *self.opened):
            file.close()
        for directory in self.made:
            remove(directory)
        with suppress(OSError):  # its maker's alone, whatever lies at the target
            os.unlink(self.target / f"{WORK}{self.token}")
        clear(self.target, self.token)
        for parent in self.parents:
            with suppress(OSError):  # holds what was saved
                parent.rmdir()

    def _opened(self, name: str) -> NewFile:
        if self.place is None and files.may_open(self.count):
            descriptor = files.unnamed(_nearest(self.target))
            if descriptor is not None:
                return NewFile(descriptor)
        directory = self.begin().path
        path = directory / marked(name, self.token if directory == self.target else "")
        return NewFile(files.named(path), path)

    def _directory(self) -> Path:
        if os.path.lexists(self.target):
            return self.target
        missing = [p for p in self.target.parents if not os.path.lexists(p)]
        self.parents += missing
        for parent in reversed(missing):
            parent.mkdir(exist_ok=True)
            files.flush(parent.parent)
        beside = self.target.parent / f"{WORK}{self.token}"
        self.made.append(beside)
        beside.mkdir()
        return beside

    def _name_all(self, place: Place, directory: Path, description: bytes, token: str) -> None:
        """Name every file in `directory`, the locked description first; all of it on the disk."""
        place.description.move(directory / f"{WORK}{self.token}")
        for name, file in self.files.items():
            file.move(directory / marked(name, token))
        descriptor = place.description.descriptor
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        files.write_all(descriptor, description)
        files.flush_open(descriptor)
        files.flush(directory)

    def _renamed(self, directory: Path) -> bool:
        """Whether a directory got the target's name: another saver may be faster."""
        try:
            os.rename(directory, self.target)
        except OSError as error:
            if error.errno in TAKEN:
                return False
            raise
        files.flush(self.target.parent)
        return True


@contextmanager
def work_for(target: Path, count: int = 0) -> Iterator[Work]:
    """A save that ends with the block."""
    work = Work(target, count)
    try:
        try:
            yield work
        finally:
            work.end()
    finally:
        work.end()  # again: an interrupt may have ended the first


def _nearest(target: Path) -> Path:
    """The directory on whose disk `target` lies, or will."""
    return next(path for path in (target, *target.parents) if os.path.lexists(path))


def _prove_replaceable(target: Path) -> None:
    """Refuse a directory where only owners may replace a file, and this is somebody else's."""
    found = os.stat(target)
    owners = (0, found.st_uid, os.stat(target / MANIFEST).st_uid)
    if found.st_mode & stat.S_ISVTX and os.geteuid() not in owners:
        raise PermissionError(errno.EACCES, "the older context there belongs to somebody else")
