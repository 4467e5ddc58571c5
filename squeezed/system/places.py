"""Where files that can be made again are kept: the user's cache, or a directory for one user alone.

A container may run without a home, or with one that cannot be written.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

VARIABLE = "SQUEEZED_CACHE"


def cache_directories() -> Iterator[Path]:
    """Directories to try, best first: `$SQUEEZED_CACHE` alone, or the user's and a private one."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        yield Path(os.path.expanduser(chosen))
        return
    user = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(user):
        user = os.path.join(os.path.expanduser("~"), ".cache")
    if os.path.isabs(user):  # without a home `~` stays as it is
        yield Path(user) / "squeezed"
    yield private_path()


def writable(directories: Iterable[Path]) -> Path | None:
    """The first directory that a file can be written to, made if it is not there, or `None`."""
    for directory in directories:
        try:
            if private_path() in (directory, *directory.parents):
                make_private(private_path())
            directory.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=directory).close()
        except OSError:
            continue
        return directory
    return None


def private_path() -> Path:
    """Name of this user's own directory among the temporary files."""
    user = os.getuid() if hasattr(os, "getuid") else "own"
    return Path(tempfile.gettempdir()) / f"squeezed-{user}"


def make_private(directory: Path) -> None:
    """Make a directory that nobody else can write to or replace, or accept it if it is one.

    Raises:
        PermissionError: what has its name is another user's, a link, or open to others.
    """
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        if not is_private(directory):
            raise PermissionError(f"{directory} is not a directory of this user alone") from None


def is_private(directory: Path) -> bool:
    """Whether a directory is there that belongs to this user and is closed to all others."""
    try:
        found = directory.lstat()
    except OSError:
        return False
    own = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    return own and stat.S_ISDIR(found.st_mode) and not stat.S_IMODE(found.st_mode) & 0o077
