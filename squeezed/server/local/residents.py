"""Contexts in memory: loaded when first asked for, the least recently used gone first."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from threading import RLock

from squeezed.hf.fixed_context import FixedContext
from squeezed.server.library.found import Entry
from squeezed.server.refusals import Refusal

log = logging.getLogger("squeezed")

WAIT_SECONDS = 120.0
"""How long a request waits for others to leave the contexts that must make room."""


@dataclass
class Resident:
    """A context in memory, or on its way there.

    Attributes:
        readers: requests that read it, or wait for it.
        forgotten: it goes with its last reader.
    """

    entry: Entry
    loading: asyncio.Task[FixedContext]
    readers: int = 0
    forgotten: bool = False

    @property
    def context(self) -> FixedContext:
        return self.loading.result()


class Residents:
    """The contexts that one engine holds; used from its event loop, but for `forget` and sums."""

    def __init__(
        self, load: Callable[[Entry], FixedContext], capacity: int, pinned: Callable[[str], bool]
    ) -> None:
        self.load, self.capacity, self.pinned = load, capacity, pinned
        self.held: OrderedDict[str, Resident] = OrderedDict()
        self.loads = self.evictions = 0
        self._one = RLock()

    @property
    def used(self) -> int:
        with self._one:
            return sum(one.entry.bytes for one in self.held.values())

    def names(self) -> set[str]:
        with self._one:
            return {one.entry.name for one in self.held.values() if one.loading.done()}

    async def read(self, entry: Entry) -> Resident:
        """A context that the caller reads until `leave`; loads it where need be.

        Raises:
            Refusal: there is no room for it.
            SqueezedError: it cannot be loaded.
        """
        one = await self._placed(entry)
        one.readers += 1
        try:
            await asyncio.shield(one.loading)
        except BaseException:
            self.leave(one)
            raise
        return one

    def leave(self, one: Resident) -> None:
        with self._one:
            one.readers -= 1
            failed = one.loading.done() and (one.loading.cancelled() or one.loading.exception())
            if one.readers == 0 and (one.forgotten or failed):
                self._drop(one)

    def forget(self, name: str) -> None:
        """Let go of the contexts of that name, with their last reader."""
        with self._one:
            for one in [one for one in self.held.values() if one.entry.name == name]:
                one.forgotten = True
                if one.readers == 0:
                    self._drop(one)

    async def _placed(self, entry: Entry) -> Resident:
        until = asyncio.get_running_loop().time() + WAIT_SECONDS
        while True:
            with self._one:
                one = self.held.get(entry.key)
                if one is None and self._has_room(entry):
                    self.loads += 1
                    work = asyncio.to_thread(self.load, entry)
                    one = self.held[entry.key] = Resident(entry, asyncio.ensure_future(work))
                if one is not None:
                    self.held.move_to_end(entry.key)
                    return one
            if asyncio.get_running_loop().time() > until:
                raise Refusal(503, "all memory for contexts is being read; try again", None,
                              "no_memory", 5)  # fmt: skip
            await asyncio.sleep(0.05)

    def _has_room(self, entry: Entry) -> bool:
        """Whether there is room, after what nobody reads has gone."""
        if entry.bytes > self.capacity:
            raise Refusal(
                503,
                f"context: {entry.name} takes {entry.bytes / 1e9:.3f} GB, and contexts may take "
                f"{self.capacity / 1e9:.3f} GB here (--context-memory)",
                "context",
                "no_memory",
            )
        idle = [one for one in self.held.values() if not one.readers and one.loading.done()]
        idle.sort(key=lambda one: self.pinned(one.entry.name))  # stable: oldest first
        free = self.capacity - self.used
        if free + sum(one.entry.bytes for one in idle) < entry.bytes:
            return False
        for one in idle:
            if free >= entry.bytes:
                break
            free += one.entry.bytes
            self.evictions += 1
            self._drop(one)
            log.info("contexts: %s left the memory", one.entry.name)
        return True

    def _drop(self, one: Resident) -> None:
        with suppress(KeyError):
            if self.held[one.entry.key] is one:
                del self.held[one.entry.key]
