"""A process that has worked may fork: its children find threads of their own.

A pre-fork server indexes or loads in the parent, and children answer. A fork copies the calling
thread alone, but GNU OpenMP, on which PyTorch and Numba run, still counts on its other threads, and
a child waits for them for ever. So the forking thread dismisses its OpenMP threads just before the
fork; parent and child start new ones when they need them.
"""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import AbstractContextManager
from threading import RLock
from typing import Protocol
from weakref import WeakSet

PAUSE_HARD = 2
"""`omp_pause_hard`: free all that OpenMP holds for this thread (OpenMP 5.0, section 3.2.44)."""

_dismissed = False


def survive_forks() -> None:
    """From now on, `os.fork` leaves parent and child able to compute. Call it once."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_dismiss_threads, after_in_child=_work_alone)
        os.register_at_fork(after_in_child=_begin_again)


class Renewed(Protocol):
    """What other threads of the parent may have been in the middle of."""

    def begin_again(self) -> None:
        """Forget those threads: they are not in the child."""


_renewed: WeakSet[Renewed] = WeakSet()


def renew_in_children(each: Renewed) -> None:
    """Have `begin_again` called in every forked child."""
    _renewed.add(each)


class Turns(AbstractContextManager):
    """A re-entrant lock that a forked child finds free, unless the forking thread holds it.

    A plain one that another thread held at the fork is locked in the child for ever.
    """

    def __init__(self) -> None:
        self._lock = RLock()
        renew_in_children(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def begin_again(self) -> None:
        if not self._lock._is_owned():  # type: ignore[attr-defined]  # as Condition asks
            self._lock = RLock()

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        return Turns, ()


def _begin_again() -> None:
    for each in list(_renewed):
        each.begin_again()


def _dismiss_threads() -> None:
    global _dismissed
    _dismissed = all(map(_dismiss, _gnu_openmp_libraries()))


def _work_alone() -> None:
    """In a child whose parent could not dismiss its threads, one thread does all the work."""
    torch = sys.modules.get("torch")
    if torch is not None and not _dismissed:
        torch.set_num_threads(1)


def _gnu_openmp_libraries() -> set[str]:
    """Paths of the GNU OpenMP libraries in this process; packages bring their own."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            return {line.split(maxsplit=5)[5].strip() for line in maps if "libgomp" in line}
    except OSError:  # not Linux: other systems' OpenMP survives a fork
        return set()


def _dismiss(library: str) -> bool:
    try:
        return ctypes.CDLL(library).omp_pause_resource_all(PAUSE_HARD) == 0
    except (OSError, AttributeError):  # deleted meanwhile, or older than OpenMP 5.0
        return False
