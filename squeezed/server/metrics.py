"""Counts for Prometheus, in a registry of each server's own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from squeezed.server.port import Ask, Ended, Piece
from squeezed.server.refusals import refusal_of

if TYPE_CHECKING:
    from squeezed.server.routes.state import Server

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SHARES = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)


class Metrics:
    """What is counted."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry, "namespace": "squeezed"}
        self.requests = Counter(
            "requests", "Answers, by route and how they ended", ["route", "ended"], **own
        )
        self.errors = Counter("http_errors", "Errors of any route, by status", ["status"], **own)
        self.hits = Counter(
            "context_hits", "Requests by how they came by a context", ["kind"], **own
        )
        self.prompt = Counter("prompt_tokens", "Tokens of prompts", ["kind"], **own)
        self.generated = Counter("generated_tokens", "Tokens of answers", **own)
        self.first = Histogram(
            "first_token_seconds", "Time to the first piece", buckets=SECONDS, **own
        )
        self.per_token = Histogram(
            "per_token_seconds", "Time per further token", buckets=SECONDS, **own
        )
        self.budget = Histogram("budget_spent", "Share of keys read", buckets=SHARES, **own)
        self.gauges: dict[str, Gauge] = {}
        self._own = own
        ProcessCollector(registry=self.registry)  # memory, processor time and files of the process

    def error(self, status: int) -> None:
        """Count an answer of HTTP that is an error, also one that no route saw."""
        self.errors.labels(str(status)).inc()

    @contextmanager
    def asking(self, ask: Ask) -> Iterator[None]:
        """Count what is refused before it begins."""
        try:
            yield
        except BaseException as error:
            self.requests.labels(route_of(ask), ended_by(error)).inc()
            raise

    def answering(self, ask: Ask) -> Watch:
        return Watch(self, ask)

    def text(self, server: Server) -> tuple[bytes, str]:
        """All of it, with the state of the engine and of the jobs as they are now."""
        states = [job.state for job in server.jobs.jobs.values()]
        found = dict(server.engine.numbers())
        found["contexts"] = len(server.library.entries())
        found["jobs_waiting"], found["jobs_running"] = (
            states.count("waiting"), states.count("running")
        )  # fmt: skip
        for name, value in found.items():
            if name not in self.gauges:
                self.gauges[name] = Gauge(name, name.replace("_", " "), **self._own)
            self.gauges[name].set(value)
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class Watch:
    """One answer, while it is written."""

    def __init__(self, metrics: Metrics, ask: Ask) -> None:
        self.metrics, self.ask = metrics, ask
        self.route = route_of(ask)
        self.started, self.first, self.outcome = time.perf_counter(), 0.0, ""

    def saw(self, piece: Piece | Ended) -> None:
        now = time.perf_counter()
        if not self.first:
            self.first = now
            self.metrics.first.observe(now - self.started)
        if isinstance(piece, Ended):
            self._ended(piece, now)

    def _ended(self, ended: Ended, now: float) -> None:
        self.outcome = ended.reason
        self.metrics.generated.inc(ended.answer_tokens)
        self.metrics.prompt.labels("context").inc(ended.document_tokens)
        self.metrics.prompt.labels("own").inc(ended.own_tokens)
        self.metrics.hits.labels(ended.report.get("matched") or "none").inc()
        if ended.answer_tokens > 1:
            self.metrics.per_token.observe((now - self.first) / (ended.answer_tokens - 1))
        spent = ended.report.get("budget_spent")
        if spent is not None:
            self.metrics.budget.observe(spent)

    def failed(self, error: BaseException) -> None:
        self.outcome = self.outcome or (ended_by(error) if self.first else "")

    def end(self) -> None:
        if self.outcome or self.first:
            self.metrics.requests.labels(self.route, self.outcome or "left").inc()


def route_of(ask: Ask) -> str:
    """`chat`, `text` or `responses`, as a label."""
    return {"chatcmpl": "chat", "cmpl": "text"}.get(ask.id.partition("-")[0], "responses")


def ended_by(error: BaseException) -> str:
    """How a request ended that got no answer, as a label."""
    if not isinstance(error, Exception) or type(error).__name__ == "ClientLeft":
        return "left"
    return str(refusal_of(error).status)
