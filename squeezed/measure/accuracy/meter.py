"""What a method really reads, and how far its attention output is from dense.

A `Meter` listens to the layers of a cache, whatever their method. Only tokens that select alone
count, as in decoding, so that a figure is per generated token. Bytes are those of the fixed
context: kept keys and values, pinned ones, and whatever the method reads to choose; relative to
reading every key and value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from squeezed.attention.interface import Attended, Suffix
from squeezed.context.bytes import LayerBytes
from squeezed.hf.cache import SqueezedCache
from squeezed.methods.base import ContextAttention
from squeezed.methods.dense import DenseLayer

SAMPLED_TOKENS = 16
"""Tokens of a request whose index bytes are measured; the others are taken to be like them."""

BINS_PER_DECADE = 20
LOWEST, HIGHEST = -6, 3  # decades of relative error
BINS = (HIGHEST - LOWEST) * BINS_PER_DECADE


@dataclass
class Meter:
    """Sums over layers and calls; `errors` holds one histogram per layer if wanted.

    Attributes:
        enabled: whether calls count.
        keys_read, keys: clustered keys read, and there to read.
        bytes_read, bytes: of the context, by the method and by dense attention.

    What is read is added up on the device: waiting for it in every layer would leave a GPU idle.
    """

    measure_errors: bool = False
    enabled: bool = True
    keys_read: Tensor | float = 0.0
    keys: float = 0.0
    bytes_read: Tensor | float = 0.0
    bytes: float = 0.0
    errors: list[ErrorHistogram] = field(default_factory=list)
    _valid: Tensor | None = field(default=None, repr=False)
    _answering: Tensor | None = field(default=None, repr=False)

    def metering(self, cache: SqueezedCache) -> SqueezedCache:
        """The same cache, whose answers count from now on; errors begin anew."""
        self.errors = []
        for entry in cache.context_layers:
            self.errors.append(ErrorHistogram())
            entry.listen = MeteredLayer(entry.context, self, self.errors[-1])
        return cache

    def spent(self) -> dict[str, float]:
        """Shares of keys and bytes; 1.0 where nothing was counted."""
        return {
            "keys_share": float(self.keys_read) / self.keys if self.keys else 1.0,
            "bytes_share": float(self.bytes_read) / self.bytes if self.bytes else 1.0,
        }

    def answering(self, query: Tensor, valid: Tensor | None) -> Tensor:
        """Which of the `B * Q` tokens of a call are real, as indices; the rest is padding.

        All layers of a pass get the same `valid`, so it is looked at once.
        """
        if valid is None:
            return torch.arange(query.shape[0] * query.shape[2], device=query.device)
        if self._valid is not valid or self._answering is None:
            self._valid, self._answering = valid, valid.flatten().nonzero()[:, 0]
        return self._answering


@dataclass
class ErrorHistogram:
    """Relative errors by logarithm, their sum and count; on the device that the errors are on."""

    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.int64))
    total: Tensor | float = 0.0
    number: int = 0

    def add(self, errors: Tensor) -> None:
        errors = errors.double().flatten()
        places = (errors.clamp(min=10.0**LOWEST).log10() - LOWEST) * BINS_PER_DECADE
        bins = places.long().clamp(0, BINS - 1)
        found = torch.zeros(BINS, dtype=torch.int64, device=errors.device)
        found.scatter_add_(0, bins, torch.ones_like(bins))
        self.counts = self.counts.to(errors.device) + found
        self.total = self.total + errors.sum()
        self.number += errors.numel()

    def merge(self, other: ErrorHistogram) -> None:
        self.counts = self.counts.to(other.counts.device) + other.counts
        self.total, self.number = self.total + other.total, self.number + other.number

    @property
    def mean(self) -> float:
        return float(self.total) / self.number if self.number else math.nan

    def quantile(self, share: float) -> float:
        """The error that `share` of the errors stay under.

        Inside its bin, an eighth wide, errors are taken to lie evenly on a logarithmic scale.
        """
        if not self.number:
            return math.nan
        counts, below = self.counts.tolist(), 0
        place = 0
        while below + counts[place] < share * self.number:
            below += counts[place]
            place += 1
        inside = (share * self.number - below) / counts[place] if counts[place] else 0.0
        return 10.0 ** (LOWEST + (place + inside) / BINS_PER_DECADE)

    def record(self) -> dict:
        """Sparse form for a result file."""
        bins = {str(i): count for i, count in enumerate(self.counts.tolist()) if count}
        return {"bins": bins, "total": float(self.total), "number": self.number}

    @classmethod
    def of(cls, record: dict) -> ErrorHistogram:
        counts = torch.tensor([record["bins"].get(str(i), 0) for i in range(BINS)])
        return cls(counts, record["total"], record["number"])


@dataclass(frozen=True)
class MeteredLayer:
    """A method's layer, of which the meter hears; a `squeezed.hf.cache_layers.Listener`."""

    inner: ContextAttention
    meter: Meter
    errors: ErrorHistogram

    def __call__(
        self, query: Tensor, suffix: Suffix, valid: Tensor | None, per_token: bool, found: Attended
    ) -> None:
        if not per_token or not self.meter.enabled:
            return
        tokens = self.meter.answering(query, valid)
        self._count(tokens_of(query, tokens), query.shape[0], found.keys_read)
        if self.meter.measure_errors:
            dense = DenseLayer(self.inner.layer).attend(query, suffix, valid, per_token)
            ours, theirs = (tokens_of(x.output, tokens).float() for x in (found, dense))
            away = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(1e-12)
            self.errors.add(away)

    def _count(self, query: Tensor, requests: int, read: Tensor) -> None:
        """Add what `read` and the index cost the tokens of `query [1, Hq, n, D]`."""
        layer, meter = self.inner.layer, self.meter
        queries, heads = query.shape[2], layer.kv_heads
        keys_read = read.sum().double()
        meter.keys_read = meter.keys_read + keys_read
        meter.keys += queries * self.inner.selectable_keys
        sample = query[:, :, :: max(1, -(-queries // (requests * SAMPLED_TOKENS)))]
        index_bytes = self.inner.index_bytes(sample) * (queries / max(1, sample.shape[2]))
        size = LayerBytes.of(layer)
        exact_bytes = size.pinned(queries * layer.pinned * heads) + size.keys(keys_read)
        meter.bytes_read = meter.bytes_read + exact_bytes + index_bytes
        meter.bytes += int(size.pinned(queries * layer.tokens * heads))  # plain, whatever is read


def tokens_of(x: Tensor, tokens: Tensor) -> Tensor:
    """The chosen tokens of a batch as one request, `[B, Hq, Q, D]` -> `[1, Hq, n, D]`."""
    return x.transpose(1, 2).flatten(0, 1)[tokens].transpose(0, 1)[None]
