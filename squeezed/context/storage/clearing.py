"""Clearing what savers left: files that no description lists any more, and works of the dead.

A file that a save is about to list is never taken: its maker's description lies beside it, locked,
until it is the context's own; and what a context lists is read after the locks were.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from squeezed.context.storage.manifest import listed_files
from squeezed.context.storage.names import MANIFEST, UNDER_WAY, WORK, token_of
from squeezed.system import files

FOREIGN_SECONDS = 86400
"""Age of a work of another kernel's saver, whose lock is not seen, after which it is cleared."""


def clear(directory: Path, own: str = "") -> None:
    """Remove the files of a saved context's directory that savers gave names and nothing lists.

    Those of living savers stay, but for the one whose token is `own`. A directory that is no saved
    context is left alone.
    """
    with suppress(OSError):
        tokens = {name: token_of(name) for name in os.listdir(directory)}
        found = {name: token for name, token in tokens.items() if token is not None}
        with _dead(directory, set(found.values()) - {"", own}) as dead:
            listed = listed_files(directory)
            if listed is None:
                return
            for name, token in found.items():
                if name not in listed and token in {"", own, *dead}:
                    with suppress(OSError):
                        os.unlink(directory / name)


def sweep(parent: Path) -> None:
    """Remove the directories of dead savers beside a target."""
    for place in _places(parent):
        with suppress(OSError):
            names = _only_ours(place)
            if names is None:
                continue
            if not names:
                os.rmdir(place)  # a living maker makes another
                continue
            with _dead(place, {place.name.removeprefix(WORK)}) as dead:
                if dead:
                    remove(place)


def remove(place: Path) -> None:
    """Remove a work's directory; what tells that its maker has ended goes last."""
    with suppress(OSError):
        for name in sorted(os.listdir(place), key=lambda x: (x in (place.name, MANIFEST), x)):
            path = place / name
            os.rmdir(path) if os.path.isdir(path) else os.unlink(path)
        os.rmdir(place)


def _only_ours(place: Path) -> list[str] | None:
    """What lies in a work's directory; `None` if some of it is not a saver's."""
    names = os.listdir(place)
    strange = [name for name in names if name != MANIFEST and token_of(name) is None]
    for name in strange:  # a trial of the target's name is an empty directory
        if not os.path.isdir(place / name) or os.listdir(place / name):
            return None
    return names


def _places(parent: Path) -> Iterator[Path]:
    with suppress(OSError):
        yield from [
            Path(entry.path)
            for entry in os.scandir(parent)
            if UNDER_WAY.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
        ]


@contextmanager
def _dead(directory: Path, tokens: Iterable[str]) -> Iterator[set[str]]:
    """Those tokens whose savers have ended; what proves it is held in the block."""
    locks: list[int] = []
    try:
        yield {token for token in tokens if _has_ended(directory, token, locks)}
    finally:
        for lock in locks:
            os.close(lock)


def _has_ended(directory: Path, token: str, locks: list[int]) -> bool:
    """Whether a saver has, as the lock of its description shows, under whichever of its names."""
    beside = directory.name == f"{WORK}{token}"
    for path in (directory / f"{WORK}{token}", *([directory / MANIFEST] if beside else [])):
        try:
            lock = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
        except FileNotFoundError:
            continue
        except OSError:
            return False
        locks.append(lock)
        if token.startswith(files.kernel()):
            return files.lock(lock) is True and files.leads_to(path, lock)
        return _is_old(path)
    return _is_old(directory) if beside else True  # in a context: published, or never there


def _is_old(path: Path) -> bool:
    return time.time() - os.stat(path).st_mtime > FOREIGN_SECONDS
