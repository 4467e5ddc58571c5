"""What a worker knows: contexts in its memory, and its requests that read them.

One per process: the connector writes here, the attention backend reads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Iterable
from typing import Any

import torch

from squeezed.vllm.arena import Arena
from squeezed.vllm.beside import Beside
from squeezed.vllm.capture import Job
from squeezed.vllm.cutting import Share
from squeezed.vllm.graphs import StepGraphs
from squeezed.vllm.meter import DeviceMeter, HostMeter
from squeezed.vllm.news import Order, Reader, StepNews, WorkerNews
from squeezed.vllm.parts import Parts
from squeezed.vllm.settings import Settings

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
        self.meter: HostMeter | DeviceMeter = HostMeter()
        self.graphs: StepGraphs | None = None
        self.uses_graphs, self.needs_python = False, False
        self.beside = Beside(None)
        self.ends: list[Callable[[], None]] = []
        """What is to be done when the step's last layer has been launched."""
        self.layers, self.index_threads = 0, 1
        self.jobs: dict[str, Job] = {}
        self.indexed: OrderedDict[str, Job] = OrderedDict()
        self._reserved: torch.Tensor | None = None
        self._untold: dict[str, tuple[int, int]] = {}

    def start(
        self,
        share: Share,
        device: torch.device,
        settings: Settings,
        requests: int = 0,
        layers: int = 0,
    ) -> None:
        """Begin anew; at most `requests` read contexts at once, of a model of so many `layers`."""
        self.__init__()
        self.layers, self.index_threads = layers, settings.index_threads
        self.arena, self.ranks = Arena(share, device, settings.implementation), share.size
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what was reserved is for contexts now
            self.meter = DeviceMeter(device, requests)
            self.uses_graphs = settings.graphs
            self.beside = Beside(torch.cuda.Stream(device))

    def reserve(self, size: int) -> None:
        """Hold so many bytes of the GPU while vLLM finds out how many are left for its blocks."""
        if self.arena is None and self._reserved is None:
            self._reserved = torch.empty(size, dtype=torch.uint8, device="cuda")

    def foresee(self, news: StepNews | None, requests: Iterable[str]) -> None:
        """Find out whether a step needs Python in its layers: it reads contexts, or makes one."""
        known: list[Container[str]] = [self.readers, self.jobs]
        known += [] if news is None else [news.readers, news.orders]
        self.needs_python = any(name in names for name in requests for names in known)

    def step(self, news: StepNews, ids: list[str], idle: bool) -> WorkerNews:
        """Take the scheduler's news; what was loaded meanwhile is said in return."""
        if news.evict and self.graphs is not None:
            self.graphs.forget()
        self.arena.evict(news.evict)
        self.arena.load(news.load.items())
        for request in news.finished:
            self._end(request)
        for request, reader in news.readers.items():
            self.readers[request] = reader
            self._report(request, _asked(reader))
        for request, why in news.fallbacks.items():
            self._report(request, {"context": None, "fallback": why})
        for request, order in news.orders.items():
            self.jobs[request] = self._reading(order)
        self.tails, self.ids = news.tails, ids
        loaded, failed = self.arena.arrived(IDLE_WAIT_SECONDS if idle else 0.0)
        seconds = {key: self.arena.seconds.pop(key) for key in loaded}
        return WorkerNews({}, dict.fromkeys(loaded, 1), failed, seconds)

    def spent(self) -> dict[str, tuple[int, int]]:
        """What requests read so far, of those of whom something new is known; ends the step."""
        ends, self.ends = self.ends, []
        for end in ends:
            end()
        for request in [name for name, job in self.jobs.items() if job.complete]:
            self.jobs.pop(request).start()
        self._settle()
        told, self._untold = self._untold, {}
        return told

    def resume(self, order: Order) -> bool:
        """Whether a document need not be read: it was captured before, or is just now."""
        known = self.indexed.get(order.name)
        if known is not None and known.order.key == order.key and known.goes_on:
            return True
        if not Parts.of(order).is_complete(order.ranks):
            return False
        self._job(order).start()
        return True

    def _reading(self, order: Order) -> Job:
        """A new job, or the one that has the pieces before."""
        known = self.indexed.get(order.name)
        if known is None or not known.joins(order):
            return self._job(order)
        known.order = order
        return known

    def _job(self, order: Order) -> Job:
        rank = self.arena.share.rank
        Parts.of(order).forget_failure(rank)
        job = Job(order, self.layers, rank, self.arena.device, self.index_threads)
        self.indexed[order.name] = job
        self.indexed.move_to_end(order.name)
        while len(self.indexed) > KEPT_REPORTS:
            self.indexed.popitem(last=False)
        return job

    def report(self, request: str) -> dict[str, Any] | None:
        """What this rank knows of a request, also after its end; ids may go on after `request`."""
        self._settle()
        for known in reversed(self.reports):
            if known == request or known.startswith(f"{request}-"):
                return self.reports[known]
        return None

    def _settle(self) -> None:
        for request, (read, available) in self.meter.told().items():
            self._untold[request] = read, available
            spent = read / available if available else None
            self.reports.get(request, {}).update(keys_read=read, budget_spent=spent)

    def _report(self, request: str, report: dict[str, Any]) -> None:
        self.reports[request] = report
        while len(self.reports) > KEPT_REPORTS:
            self.reports.popitem(last=False)

    def _end(self, request: str) -> None:
        job = self.jobs.pop(request, None)
        if job is not None and not job.order.is_piece:
            job.fail("the request that read the document ended early")
        self.readers.pop(request, None)
        self.meter.forget(request)


def _asked(reader: Reader) -> dict[str, Any]:
    asked = {"context": reader.name, "preset": reader.preset, "budget": reader.budget}
    return asked | {"budget_spent": None, "keys_read": 0}


WORKER = Worker()
