"""Counters beside vLLM's own, on its `/metrics`."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from prometheus_client import REGISTRY
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from squeezed.vllm.serving import Counts, Serving

SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100)

COUNTERS = {
    "keys_read": "Clustered keys of contexts that were read exactly.",
    "keys_available": "Clustered keys that dense attention would have read of the same contexts.",
    "loads": "Contexts that were loaded.",
    "failed_loads": "Contexts that a rank could not load.",
    "evictions": "Contexts that made room for others, or were deleted.",
}
GAUGES = {
    "contexts": "Contexts that are registered.",
    "contexts_refused": "Directories that hold no context this engine can use.",
    "contexts_resident": "Contexts in memory.",
    "resident_bytes": "Bytes of contexts in memory, on every rank.",
    "capacity_bytes": "Bytes that contexts may take, on every rank.",
}
KINDS = ("context", "dense", "fallback")


@dataclass
class Stats(KVConnectorStats):
    """What happened since the last report, as vLLM carries it from the scheduler to the API."""

    @classmethod
    def of(cls, serving: Serving, load_seconds: list[float]) -> Stats:
        """Takes what `serving` counted."""
        counts, serving.counts = serving.counts, Counts()
        residency = serving.residency
        gauges = {
            "contexts": len(serving.catalogue.contexts),
            "contexts_refused": len(serving.catalogue.refused),
            "contexts_resident": len(residency.held),
            "resident_bytes": residency.used,
            "capacity_bytes": residency.capacity,
        }
        return cls(data=asdict(counts) | {"load_seconds": load_seconds, "gauges": gauges})

    def reset(self) -> None:
        self.data = {}

    def is_empty(self) -> bool:
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> Stats:
        """Counts are added; the later gauges stand."""
        if self.is_empty() or other.is_empty():
            return self if other.is_empty() else Stats(data=other.data)
        mine, its = self.data, other.data
        requests = {
            kind: mine["requests"].get(kind, 0) + its["requests"].get(kind, 0) for kind in KINDS
        }
        added = {name: mine[name] + its[name] for name in (*COUNTERS, "load_seconds")}
        return Stats(data=added | {"requests": requests, "gauges": its["gauges"]})

    def reduce(self) -> dict[str, int | float]:
        """One line of vLLM's log."""
        if self.is_empty():
            return {}
        requests, available = self.data["requests"], self.data["keys_available"]
        found = {f"squeezed {kind}": requests.get(kind, 0) for kind in KINDS}
        if available:
            found["budget spent"] = round(self.data["keys_read"] / available, 4)
        return found


class Prometheus(KVConnectorPromMetrics):
    """`squeezed_*` metrics of every engine."""

    registered: ClassVar[list[Any]] = []
    """Of the engine before in this process, in whose place the next one's metrics stand, as with
    vLLM's own."""

    def __init__(self, vllm_config, metric_types, labelnames, per_engine_labelvalues) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        while self.registered:
            with suppress(KeyError):  # where an engine keeps its metrics elsewhere
                REGISTRY.unregister(self.registered.pop())
        self.requests = self._counter_cls(
            "squeezed_requests_total",
            "Requests by how they were served: over a context, dense, or dense though a context "
            "was asked for.",
            [*labelnames, "kind"],
        )
        self.counters = {
            name: self._counter_cls(f"squeezed_{name}_total", text, labelnames)
            for name, text in COUNTERS.items()
        }
        self.gauges = {
            name: self._gauge_cls(f"squeezed_{name}", text, labelnames)
            for name, text in GAUGES.items()
        }
        self.load_seconds = self._histogram_cls(
            "squeezed_load_seconds", "Time to load a context.", labelnames, buckets=SECONDS
        )
        self.registered += [*self.counters.values(), *self.gauges.values()]
        self.registered += [self.requests, self.load_seconds]

    def observe(self, transfer_stats_data, engine_idx: int = 0) -> None:
        if not transfer_stats_data:
            return
        labels = self.per_engine_labelvalues[engine_idx]
        for kind, count in transfer_stats_data["requests"].items():
            self.requests.labels(*labels, kind).inc(count)
        for name, counter in self.counters.items():
            counter.labels(*labels).inc(transfer_stats_data[name])
        for name, value in transfer_stats_data["gauges"].items():
            self.gauges[name].labels(*labels).set(value)
        for seconds in transfer_stats_data["load_seconds"]:
            self.load_seconds.labels(*labels).observe(seconds)
