"""Files without names, locks that end with their maker, and what it takes to have files on disk."""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import socket
import uuid
from pathlib import Path

try:
    import fcntl
    import resource
except ImportError:  # no locks, so nothing of others is ever cleared
    fcntl = resource = None  # type: ignore[assignment]

OF_DESCRIPTOR = "/proc/self/fd"
BOOT = Path("/proc/sys/kernel/random/boot_id")


def unnamed(directory: Path) -> int | None:
    """A new file on the disk of `directory` that no name leads to: it ends with its last
    descriptor, however the process ends. `None` where there are no such files.

    `give_name` makes it last.
    """
    flag = getattr(os, "O_TMPFILE", None)
    if flag is None or not os.path.isdir(OF_DESCRIPTOR):
        return None
    try:
        return os.open(directory, flag | os.O_RDWR | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
            return None  # the file system, or the kernel, has none
        raise


def may_open(count: int, spare: int = 32) -> bool:
    """Whether this process may open so many files more, and a few others besides."""
    if resource is None:
        return True
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        now = len(os.listdir(OF_DESCRIPTOR))
    except OSError:
        return False
    return most == resource.RLIM_INFINITY or now + count + spare < most


def named(path: Path) -> int:
    """A new file at `path`, where nothing may lie."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    return os.open(path, flags | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0), 0o666)


def give_name(descriptor: int, path: Path) -> None:
    """Let the name `path`, where nothing may lie, lead to an `unnamed` file."""
    parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:  # a descriptor of the parent makes Python follow the link that leads to the file
        source = f"{OF_DESCRIPTOR}/{descriptor}"
        os.link(source, path.name, dst_dir_fd=parent, follow_symlinks=True)
    finally:
        os.close(parent)


def write_all(descriptor: int, content: bytes | memoryview) -> None:
    """Write all of it, where one call may write less."""
    rest = memoryview(content)
    while len(rest):
        rest = rest[os.write(descriptor, rest) :]


def flush(path: Path) -> None:
    """Have a file's content, or a directory's entries, on the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a directory where one may write, but not look
        return
    try:
        flush_open(descriptor)
    finally:
        os.close(descriptor)


def flush_open(descriptor: int) -> None:
    """Have an open file's content on the disk."""
    try:
        if not _flush_drive(descriptor):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # a directory that cannot be flushed
            raise


def _flush_drive(descriptor: int) -> bool:
    """Whether the drive wrote what it holds, too: on macOS `fsync` does not ask it to."""
    command = getattr(fcntl, "F_FULLFSYNC", None)
    if command is None:
        return False
    try:
        fcntl.fcntl(descriptor, command)
    except OSError:  # a file system without
        return False
    return True


def lock(descriptor: int) -> bool | None:
    """Whether an exclusive lock could be taken; `None` where the system or the file system has
    none. The kernel gives it back when its last descriptor ends, however the process ends.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def leads_to(path: Path, descriptor: int) -> bool:
    """Whether the name still means the open file."""
    try:
        found = os.stat(path)
    except OSError:
        return False
    own = os.fstat(descriptor)
    return (found.st_ino, found.st_dev) == (own.st_ino, own.st_dev)


@functools.cache
def kernel() -> str:
    """Eight hexadecimal digits that processes share exactly if they see each other's locks."""
    try:
        return BOOT.read_text()[:8]
    except OSError:  # not Linux: the machine's name and network card; both, for names are shared
        machine = f"{socket.gethostname()} {uuid.getnode()}"
        return hashlib.sha256(machine.encode(errors="surrogateescape")).hexdigest()[:8]
