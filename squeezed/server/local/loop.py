"""The thread that runs the model for all lanes, one turn of each after the other."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from threading import Condition, Thread

from squeezed.server.local.lane import Lane
from squeezed.server.local.rows import Row
from squeezed.server.refusals import Refusal

log = logging.getLogger("squeezed")


class Loop:
    """Turns of lanes, in order: a context with many readers delays the others by a step of its own.

    Attributes:
        lanes: those with something to do, by key.
    """

    def __init__(self) -> None:
        self.lanes: dict[str, Lane] = {}
        self.changed = Condition()
        self.ending = False
        self._thread = Thread(target=self._run, name="squeezed engine", daemon=True)
        self._thread.start()

    def add(self, key: str, make: Callable[[], Lane], row: Row) -> None:
        """Let a row wait in a lane, which is made if nobody is in it."""
        with self.changed:
            if self.ending:
                raise Refusal(503, "the server is about to end", None, "closing", 10)
            lane = self.lanes.get(key)
            if lane is None:
                lane = self.lanes[key] = make()
            lane.add(row)
            self.changed.notify_all()

    def wake(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def counts(self) -> tuple[int, int]:
        """Rows that are written, and rows that wait."""
        with self.changed:
            lanes = list(self.lanes.values())
        return sum(lane.running for lane in lanes), sum(len(lane.waiting) for lane in lanes)

    def end(self, grace: float) -> None:
        """Take no more rows, wait for those that are there, then fail what is left."""
        until = time.monotonic() + grace
        with self.changed:
            while self.lanes and time.monotonic() < until:
                self.changed.wait(0.1)
            self.ending = True
            self.changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while self._wait():
            with self.changed:
                turns = list(self.lanes.items())
            for key, lane in turns:
                self._turn(key, lane)
        for lane in self.lanes.values():
            lane.fail(Refusal(503, "the server has ended", None, "closing", 10))
        self.lanes.clear()

    def _wait(self) -> bool:
        """Wait until a lane has something to do; whether to go on."""
        with self.changed:
            while not self.lanes and not self.ending:
                self.changed.wait()
            return not self.ending

    def _turn(self, key: str, lane: Lane) -> None:
        try:
            lane.turn()
        except Exception as error:  # of ours: its rows end, the server goes on
            log.exception("a turn failed")
            lane.fail(error)
        with self.changed:
            if not lane.busy:
                self.lanes.pop(key, None)
                self.changed.notify_all()
