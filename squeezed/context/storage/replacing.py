"""Where a directory is written before it is complete, and how it takes an older one's place.

A *place* is a hidden directory beside the target, made and locked by one saver and removed by it
alone. It holds a lock file with the target's name, the new directory, and, on systems that cannot
exchange two names in one step, what was moved aside. Its lock says whether its maker lives, also
across containers: the kernel gives it back when the maker ends, however it ends. What dead makers
left is put back or cleared by the next save; `recover` puts back what a reader misses.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from squeezed.errors import ContextFileError, shown

PREFIX = ".squeezed-"
LOCK, NEW, OLD = "lock", "context", "old-"
RENAME_EXCHANGE = 2
NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
ATTEMPTS = 1000
WAIT_SECONDS = 10.0
"""How long a reader waits for a saver that has moved the older context aside."""
FOREIGN_SECONDS = 86400
"""Age of a place that another kernel's savers left, after which it is cleared: no lock is seen."""


class Place:
    """A place for one save. `make`, write into `new`, `publish`; `remove` ends it in any case."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path: Path | None = None
        self.lock: int | None = None
        self.parents: list[Path] = []

    @property
    def made(self) -> Path:
        assert self.path is not None
        return self.path

    @property
    def new(self) -> Path:
        return self.made / NEW

    def make(self) -> None:
        """Make the place, locked, with an empty `new` in it, and missing parents of the target."""
        self._make_parents()
        for _ in range(ATTEMPTS):
            self.path = self.target.parent / f"{PREFIX}{kernel()}-{secrets.token_hex(16)}"
            self.path.mkdir(mode=0o700)
            with suppress(FileNotFoundError):  # cleared before it was locked: make another
                self.lock = _opened(self.path / LOCK)
                os.write(self.lock, os.fsencode(self.target.name))
                if _locked(self.lock) is not False and _is_still(self.lock, self.path / LOCK):
                    self.new.mkdir()
                    return
            self._unlock()
        raise OSError(errno.EBUSY, "its temporary directories are taken away by another process")

    def publish(self, check: Callable[[Path], None]) -> None:
        """Put `new` at the target; `check` raises for an older directory that must stay."""
        for attempt in range(ATTEMPTS):
            if not os.path.lexists(self.target):
                try:
                    os.rename(self.new, self.target)
                except OSError as error:
                    if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                        continue  # another saver was faster
                    raise
                return
            try:
                if self._replaced(attempt, check):
                    return
            except FileNotFoundError:  # another saver has moved it aside
                continue
        raise OSError(errno.EBUSY, "too many other processes save there")

    def _replaced(self, attempt: int, check: Callable[[Path], None]) -> bool:
        """Whether `new` took the older one's place in one step; else that is moved aside."""
        try:
            exchange(self.new, self.target)
        except NotImplementedError:
            aside = self.made / f"{OLD}{attempt:06d}"
            os.rename(self.target, aside)
            check(aside)
            return False
        try:
            check(self.new)
        except BaseException:
            exchange(self.new, self.target)
            raise
        return True

    def remove(self) -> None:
        """End the place: put back what was moved aside, flush, remove. May be called again."""
        if self.path is not None and os.path.lexists(self.path):
            _settle(self.path, self.target)
        self._unlock()
        for parent in self.parents:
            with suppress(OSError):  # holds what was saved
                parent.rmdir()

    def _make_parents(self) -> None:
        missing = [p for p in self.target.parents if not os.path.lexists(p)]
        self.parents = missing
        for parent in reversed(missing):
            parent.mkdir(exist_ok=True)
            flush(parent.parent)

    def _unlock(self) -> None:
        if self.lock is not None:
            lock, self.lock = self.lock, None
            os.close(lock)


@contextmanager
def place_for(target: Path) -> Iterator[Place]:
    """A place that ends with the block."""
    place = Place(target)
    try:
        try:
            place.make()
            yield place
        finally:
            place.remove()
    finally:
        place.remove()  # again: an interrupt may have ended the first


def exchange(one: Path, other: Path) -> None:
    """Exchange what two names mean, in one step.

    Raises:
        NotImplementedError: the system or the file system has no such step.
        OSError: it failed.
    """
    call = _renameat2()
    if call is None:
        raise NotImplementedError
    at_cwd = -100
    if call(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), RENAME_EXCHANGE):
        code = ctypes.get_errno()
        if code in NO_EXCHANGE:
            raise NotImplementedError
        raise OSError(code, os.strerror(code), str(one), None, str(other))


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is not None:
        text = ctypes.c_char_p
        call.argtypes = (ctypes.c_int, text, ctypes.c_int, text, ctypes.c_uint)
    return call


@functools.cache
def kernel() -> str:
    """Eight letters that savers share exactly if they see each other's locks."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    return os.fsencode(socket.gethostname()).hex()[:8].ljust(8, "0")


def flush(path: Path) -> None:
    """Have a file's content, or a directory's entries, on the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a directory where one may write, but not look
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # a directory that cannot be flushed
            raise
    finally:
        os.close(descriptor)


def resolve(path: Path) -> Path:
    """The real place of `path`, links followed.

    Raises:
        ContextFileError: a path without a name, or a link to nothing.
    """
    if path.name in ("", "..") or "\0" in str(path):
        raise ContextFileError(
            f"output: {shown(path)} does not name a directory; name one, as in manual.sqz"
        )
    real = Path(os.path.realpath(path))
    if path.is_symlink() and not os.path.lexists(real):
        raise ContextFileError(
            f"output: {shown(path)} is a link to {shown(real)}, which does not exist; remove the "
            "link or make the directory that it names"
        )
    return real


def prove_writable(target: Path) -> None:
    """Raise `OSError` unless a directory can be made at, or exchanged for, the resolved `target`.

    Makes and removes a directory there. Room on the disk is not proved.
    """
    with suppress(FileNotFoundError):  # nothing there, or another saver is replacing it
        _prove_replaceable(target)
    base = next(p for p in target.parents if os.path.lexists(p))
    with place_for(base / target.name) as place:
        place.new.joinpath(*target.relative_to(base).parts).mkdir(parents=True)


def _prove_replaceable(target: Path) -> None:
    parent = os.stat(target.parent)
    owners = (0, parent.st_uid, os.stat(target).st_uid)
    sticky = parent.st_mode & 0o1000 and os.geteuid() not in owners
    if sticky or not os.access(target, os.W_OK | os.X_OK):
        os.stat(target)  # not for somebody else's rights, but gone meanwhile
        raise PermissionError(errno.EACCES, "the older context there belongs to somebody else")
    if os.path.ismount(target):
        raise OSError(errno.EBUSY, "a file system is mounted there; name a directory inside it")


def sweep(parent: Path) -> None:
    """Put back and clear what dead savers left in a directory."""
    for place in _places(parent):
        with suppress(OSError):
            _end_if_dead(place)


def recover(target: Path) -> bool:
    """Whether a saver had moved `target` aside; then it is at its name again, or was."""
    seen = False
    end = time.monotonic() + WAIT_SECONDS
    for place in _places(target.parent):
        with suppress(OSError):
            aside = any(entry.name.startswith(OLD) for entry in os.scandir(place))
            if not aside or _note(place) != target.name:
                continue
            seen = True
            while not _end_if_dead(place) and time.monotonic() < end:
                if os.path.lexists(target):
                    break
                time.sleep(0.01)
    return seen


def is_there(target: Path) -> bool:
    """Whether something lies at `target`, or does as soon as the savers at work there let it."""
    missed = 0
    while missed < 3:  # a saver may end, and another one begin, while this looks
        if os.path.lexists(target):
            return True
        missed = 0 if recover(target) else missed + 1
    return False


def _places(parent: Path) -> Iterator[Path]:
    with suppress(OSError):
        yield from [
            Path(entry.path)
            for entry in os.scandir(parent)
            if entry.name.startswith(PREFIX) and entry.is_dir(follow_symlinks=False)
        ]


def _end_if_dead(place: Path) -> bool:
    """Settle a place whose maker has ended; whether it had."""
    if not _is_ours(place) or not _locks_seen(place):
        return False
    lock = _opened(place / LOCK)
    try:
        if not _locked(lock) or not _is_still(lock, place / LOCK):
            return False
        _settle(place, place.parent / _note(place))
        return True
    finally:
        os.close(lock)


def _is_ours(place: Path) -> bool:
    names = [entry.name for entry in os.scandir(place)]
    return all(name in (LOCK, NEW) or name.startswith(OLD) for name in names)


def _locks_seen(place: Path) -> bool:
    """Whether the lock of a place is this kernel's to tell, or the place old enough without it."""
    own = place.name.startswith(f"{PREFIX}{kernel()}-")
    return own or time.time() - os.stat(place).st_mtime > FOREIGN_SECONDS


def _note(place: Path) -> str:
    """Name of the target that a place was made for; empty if its maker did not come so far."""
    name = os.fsdecode((place / LOCK).read_bytes())
    return "" if "/" in name or name in (".", "..") else name


def _settle(place: Path, target: Path) -> None:
    """Put back what was moved aside and is missing, flush, and remove the place."""
    aside = sorted(place.glob(f"{OLD}*"))
    if aside and target.name and not os.path.lexists(target):
        with suppress(OSError):  # another saver was faster
            os.rename(aside[-1], target)
    flush(place.parent)  # whatever is at the target now stays, before the other one goes
    shutil.rmtree(place, ignore_errors=True)


def _opened(lock: Path) -> int:
    return os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _locked(lock: int) -> bool | None:
    """Whether an exclusive lock could be taken; `None` where the file system has no locks.

    There a saver goes on without, and what a dead one leaves is not cleared.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_still(lock: int, file: Path) -> bool:
    """Whether an open lock is the one at its name: it may have been removed before it was taken."""
    found, own = os.stat(file), os.fstat(lock)
    return (found.st_ino, found.st_dev) == (own.st_ino, own.st_dev)
