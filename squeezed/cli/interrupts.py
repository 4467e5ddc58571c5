"""Ctrl-C: one clean end, at whatever moment it comes."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
from types import FrameType

ONE_PRESS_SECONDS = 1.0
"""Presses this close to the first are the same: cleaning up is not interrupted."""

AGAIN_SECONDS = 0.05


class Interrupts:
    """While entered, SIGINT raises `KeyboardInterrupt` once, and again if a library swallowed it.

    Python drops an exception that is raised inside a `__del__` or a callback from C; such an
    interrupt is sent anew a moment later. Does nothing where somebody else handles SIGINT, or
    outside the main thread.

    Attributes:
        seen: whether an interrupt came.
        last: nothing follows: interrupts that come after the work are ignored.
    """

    def __init__(self, last: bool) -> None:
        self.last = last
        self.pressed: float | None = None
        self.ours = False

    @property
    def seen(self) -> bool:
        return self.pressed is not None

    def __enter__(self) -> Interrupts:
        main = threading.current_thread() is threading.main_thread()
        self.ours = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self.ours:
            self.hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
            signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *error: object) -> None:
        if self.ours:
            after = signal.SIG_IGN if self.last else signal.default_int_handler
            signal.signal(signal.SIGINT, after)
            sys.unraisablehook = self.hook

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.pressed is not None and now - self.pressed < ONE_PRESS_SECONDS:
            return
        self.pressed = now
        raise KeyboardInterrupt

    def _unraisable(self, event: sys.UnraisableHookArgs) -> None:
        if not issubclass(event.exc_type, KeyboardInterrupt):
            self.hook(event)
            return
        self.pressed = None
        again = threading.Timer(AGAIN_SECONDS, _thread.interrupt_main)
        again.daemon = True
        again.start()
