"""What a worker knows: contexts in its memory, and its requests that read them.

One per process: the connector writes here, the attention backend reads.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from squeezed.vllm.arena import Arena
from squeezed.vllm.cutting import Share
from squeezed.vllm.news import Reader, StepNews, WorkerNews

KEPT_REPORTS = 4096
"""Requests that are over and of which `report` still tells."""

IDLE_WAIT_SECONDS = 0.01
"""How long a step without work waits for a context that is being loaded."""


class Worker:
    """State of one rank."""

    def __init__(self) -> None:
        self.arena: Arena | None = None
        self.ranks = 1
        self.readers: dict[str, Reader] = {}
        self.tails: dict[int, str] = {}
        self.ids: list[str] = []
        self.reports: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self.counted: dict[str, list] = {}
        self._touched: set[str] = set()

    def start(self, share: Share, device: torch.device, implementation: str) -> None:
        self.__init__()
        self.arena, self.ranks = Arena(share, device, implementation), share.size

    def step(self, news: StepNews, ids: list[str], idle: bool) -> WorkerNews:
        """Take the scheduler's news; what was loaded meanwhile is said in return."""
        self.arena.evict(news.evict)
        self.arena.load(news.load.items())
        for request in news.finished:
            self._end(request)
        for request, reader in news.readers.items():
            self.readers[request] = reader
            self._report(request, _asked(reader))
        for request, why in news.fallbacks.items():
            self._report(request, {"context": None, "fallback": why})
        self.tails, self.ids = news.tails, ids
        loaded, failed = self.arena.arrived(IDLE_WAIT_SECONDS if idle else 0.0)
        seconds = {key: self.arena.seconds.pop(key) for key in loaded}
        return WorkerNews({}, dict.fromkeys(loaded, 1), failed, seconds)

    def count(self, request: str, read, available: int) -> None:
        """`read` more keys of `available` were read by a request, of one layer in one step."""
        both = self.counted.setdefault(request, [0, 0])
        both[0] = both[0] + read
        both[1] += available
        self._touched.add(request)

    def spent(self) -> dict[str, tuple[int, int]]:
        """Of the requests of the last step, all that they read so far."""
        touched, self._touched = self._touched, set()
        found = {}
        for request in touched:
            if request in self.counted:
                read, available = self.counted[request]
                found[request] = int(read), available
                self.reports[request] |= {
                    "keys_read": int(read),
                    "budget_spent": int(read) / available if available else None,
                }
        return found

    def report(self, request: str) -> dict[str, Any] | None:
        """What this rank knows of a request, also after its end; ids may go on after `request`."""
        for known in reversed(self.reports):
            if known == request or known.startswith(f"{request}-"):
                return self.reports[known]
        return None

    def _report(self, request: str, report: dict[str, Any]) -> None:
        self.reports[request] = report
        while len(self.reports) > KEPT_REPORTS:
            self.reports.popitem(last=False)

    def _end(self, request: str) -> None:
        self.readers.pop(request, None)
        self.counted.pop(request, None)


def _asked(reader: Reader) -> dict[str, Any]:
    asked = {"context": reader.name, "preset": reader.preset, "budget": reader.budget}
    return asked | {"budget_spent": None, "keys_read": 0}


WORKER = Worker()
