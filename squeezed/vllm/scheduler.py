"""The scheduler's half of the connector: which requests read a context, and what workers must know.

It meets vLLM's requests and block hashes; `Serving`, which it asks, knows contexts and no vLLM.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from squeezed.errors import SqueezedError
from squeezed.vllm import blocks, capture, metrics
from squeezed.vllm.engine import catalogue_of, device_bytes, engine_of, place_of
from squeezed.vllm.news import Origin, Reader, StepNews, WorkerNews
from squeezed.vllm.refusals import check_engine, impossible
from squeezed.vllm.residency import Residency
from squeezed.vllm.serving import SLIDING, Reading, Serving
from squeezed.vllm.settings import Settings

RETRY_SECONDS = 60.0
"""After this time a context that could not be loaded may be tried again."""

STATS_SECONDS = 0.5
"""Least time between two reports for metrics while no request ends."""


@dataclass
class ToWorkers(StepNews, KVConnectorMetadata):
    """`StepNews` as vLLM carries it."""


@dataclass
class Chain:
    """The hashes of a request over a context: the context's blocks, and their ends.

    Attributes:
        usual: hash that vLLM gave the context's last block.
        own: hash that stands there instead.
    """

    blocks: int
    usual: bytes
    own: bytes


@dataclass
class Late:
    """A report that leaves with this step, and takes the numbers that come at its end."""

    reading: Reading
    report: dict[str, Any] = field(default_factory=dict)


class SchedulerHalf:
    """Requests of vLLM's scheduler, and `Serving`, which knows contexts."""

    def __init__(self, vllm_config, kv_cache_config, settings: Settings) -> None:
        on_cpu = vllm_config.device_config.device_type == "cpu"
        check_engine(vllm_config, on_cpu)
        self.block_size = vllm_config.cache_config.block_size
        self.ranks = vllm_config.parallel_config.tensor_parallel_size
        self.never = SLIDING if len(kv_cache_config.kv_cache_groups) > 1 else None
        self.names_rows = not on_cpu
        self.block_ids = None
        catalogue = catalogue_of(vllm_config, settings)
        catalogue.watch(settings.scan_seconds)
        residency = Residency(settings.memory_bytes(device_bytes(on_cpu)))
        self.serving = Serving(settings, catalogue, residency)
        self.pool_tokens = (kv_cache_config.num_blocks - 1) * self.block_size
        self.place = place_of(settings)
        # files are looked at: now, not while others wait
        self.engine = engine_of(vllm_config) if self.place else {}
        self.indexing: set[str] = set()
        self.chains: dict[str, Chain] = {}
        self.using: Counter[bytes] = Counter()
        self.to_tell = ToWorkers()
        self.have: Counter[str] = Counter()
        self.late: dict[str, Late] = {}
        self.failed_at: float | None = None
        self.load_seconds: list[float] = []
        self.told_at, self.some_ended = time.monotonic(), False

    def arrive(self, request) -> None:
        arguments = (request.sampling_params.extra_args or {}) if request.sampling_params else {}
        if capture.ARGUMENT in arguments:
            self._order(request, arguments[capture.ARGUMENT])
            return
        reading = self.serving.arrive(
            request.request_id,
            request.prompt_token_ids,
            arguments,
            self.never or impossible(request),
        )
        if reading.why is not None:
            self.to_tell.fallbacks[request.request_id] = reading.why
        self.may_begin(request)

    def _order(self, request, text: Any) -> None:
        """A request whose document is to be indexed, or a piece of it.

        It finds what earlier pieces left in the prefix cache, by a salt of their own. Without one
        all of it is computed: a probe that others left in the cache leaves no queries.
        """
        if request.cache_salt is None:
            request.skip_reading_prefix_cache = True
        reading = self.serving.readings[request.request_id] = Reading(request.request_id, None)
        try:
            if self.never or impossible(request, looks_up=False):
                raise SqueezedError(
                    f"{capture.ARGUMENT}: documents are indexed here for models without sliding "
                    "windows; use squeezed index"
                )
            order = capture.order_of(text, request.prompt_token_ids, self.place, self.engine)
            self._check_pool(order.tokens)
        except SqueezedError as error:
            reading.why = self.to_tell.fallbacks[request.request_id] = str(error)
            return
        if len(order.prompt) > order.document_tokens:  # before that there is nothing to keep
            self.indexing.add(request.request_id)
            self.to_tell.orders[request.request_id] = order

    def _check_pool(self, tokens: int) -> None:
        if tokens + 1 > self.pool_tokens:
            raise SqueezedError(
                f"{capture.ARGUMENT}: {tokens} tokens do not fit into the {self.pool_tokens} of "
                "vLLM's blocks; give it more, or use squeezed index"
            )

    def may_begin(self, request) -> bool:
        """Whether the request may be scheduled: it reads no context, or its context is there.

        When the context has just arrived, the request was looked up without it: ask again.
        """
        if request.request_id in self.chains:
            return True
        reading = self.serving.readings.get(request.request_id)
        if reading is None or reading.found is None:
            return True
        if self.serving.may_begin(reading) and reading.found is not None:
            self._chain(request, reading)
            return False
        if reading.found is None:
            self.to_tell.fallbacks[request.request_id] = reading.why
        return reading.found is None

    def _chain(self, request, reading: Reading) -> None:
        """From now on the block manager finds the context's blocks for this request alone."""
        count = len(reading.found.tokens) // self.block_size
        usual = request.block_hashes[count - 1]
        own = blocks.own_chain(request, count, reading.said)
        self.chains[request.request_id] = Chain(count, usual, own)
        self.using[own] += 1
        blocks.ENDS[own] = count

    def _unchain(self, request_id: str) -> None:
        chain = self.chains.pop(request_id, None)
        if chain is None:
            return
        self.using[chain.own] -= 1
        if not self.using[chain.own]:
            del self.using[chain.own], blocks.ENDS[chain.own]

    def admitted(self, request, groups: tuple[list[int], ...]) -> None:
        """A request has its blocks: those of its context are null, and no others are."""
        chain = self.chains.get(request.request_id)
        ids = groups[0]
        if chain is None:
            assert not ids or ids[0] or self.never, f"{request.request_id}: null blocks, no context"
            return
        null = not any(ids[: chain.blocks]) and all(ids[chain.blocks :])
        assert null, f"{request.request_id}: {chain.blocks} null blocks expected, got {ids[:8]}"
        reading = self.serving.readings[request.request_id]
        self.to_tell.readers[request.request_id] = Reader(
            reading.found.key,
            reading.found.name,
            *reading.rule,
            len(reading.found.tokens) + reading.found.dropped,
            reading.prompt_tokens,
        )

    def news_for(self, scheduler_output) -> ToWorkers:
        news, self.to_tell = self.to_tell, ToWorkers()
        orders = self.serving.residency.take_orders()
        self.serving.counts.loads += len(orders.load)
        self.serving.counts.evictions += len(orders.evict)
        for key in orders.evict:
            self.have.pop(key, None)
        news.evict = orders.evict
        news.load = {
            key: Origin(entry.path, entry.version, entry.dropped)
            for key, entry in orders.load.items()
        }
        news.finished = list(scheduler_output.finished_req_ids)
        if not self.names_rows:
            news.tails = dict(self._tails(scheduler_output))
        self.late.clear()
        self._tidy()
        return news

    def _tails(self, scheduler_output) -> Iterable[tuple[int, str]]:
        """The block of each request's last token in this step: no two requests write into one."""
        new, old = scheduler_output.scheduled_new_reqs, scheduler_output.scheduled_cached_reqs
        done = {request.req_id: request.num_computed_tokens for request in new}
        done |= dict(zip(old.req_ids, old.num_computed_tokens, strict=True))
        for request, count in scheduler_output.num_scheduled_tokens.items():
            if request in self.chains or request in self.indexing:
                place = (done[request] + count - 1) // self.block_size
                yield self.block_ids(request)[0][place], request

    def heard(self, news: WorkerNews) -> None:
        for request, (read, available) in news.spent.items():
            reading = self.serving.readings.get(request)
            late = self.late.get(request)
            reading = reading or (late.reading if late else None)
            if reading is None:
                continue
            self.serving.counts.keys_read += read - reading.read
            self.serving.counts.keys_available += available - reading.available
            reading.read, reading.available = read, available
            if late:
                late.report.update(reading.report())
        residency = self.serving.residency
        for key, ranks in news.loaded.items():
            self.have[key] += ranks
            if self.have[key] == self.ranks:
                residency.loaded(key)
                self.load_seconds.append(news.seconds.get(key, 0.0))
        for key, why in news.failed.items():
            residency.failed(key, why)
            self.serving.counts.failed_loads += 1
            self.failed_at = time.monotonic()

    def finished(self, request) -> dict | None:
        """What the answer says; its numbers may still come with this step's end."""
        self.indexing.discard(request.request_id)
        self.some_ended = True
        self._unchain(request.request_id)
        reading = self.serving.end(request.request_id)
        report = reading.report() if reading else None
        if report is None:
            return None
        if reading.found is not None:
            self.late[request.request_id] = Late(reading, report)
        return {"squeezed": report}

    def stats(self):
        """What happened since the last report: when a request ended, or after a while."""
        now = time.monotonic()
        if not self.some_ended and now - self.told_at < STATS_SECONDS:
            return None
        self.told_at, self.some_ended = now, False
        taken, self.load_seconds = self.load_seconds, []
        return metrics.Stats.of(self.serving, taken)

    def end(self) -> None:
        self.serving.catalogue.end()

    def _tidy(self) -> None:
        self.serving.tidy()
        if self.failed_at is not None and time.monotonic() - self.failed_at > RETRY_SECONDS:
            self.serving.residency.forget_failures()
            self.failed_at = None
