"""What a method really reads, and how far its attention output is from dense.

A `Meter` wraps the layers of any method. Only tokens that select alone count, as in decoding, so
that a figure is per generated token. Bytes are those of the fixed context: kept keys and values,
pinned ones, and whatever the method reads to choose; relative to reading every key and value.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from squeezed.methods.base import ContextAttention
from squeezed.methods.dense import DenseLayer
from squeezed.tree import ClusteredLayer

SAMPLED_ROWS = 16
"""Query rows of a call whose index bytes are measured; the others are taken to be like them."""

BINS_PER_DECADE = 20
LOWEST, HIGHEST = -6, 3  # decades of relative error
BINS = (HIGHEST - LOWEST) * BINS_PER_DECADE


@dataclass
class Meter:
    """Sums over layers and calls; `errors` holds one histogram per layer if wanted.

    Attributes:
        keys_read, keys: clustered keys read, and there to read.
        bytes_read, bytes: of the context, by the method and by dense attention.
    """

    measure_errors: bool = False
    keys_read: float = 0.0
    keys: float = 0.0
    bytes_read: float = 0.0
    bytes: float = 0.0
    errors: list[ErrorHistogram] = field(default_factory=list)

    def wrap(self, layers: list[ContextAttention]) -> list[MeteredLayer]:
        self.errors = [ErrorHistogram() for _ in layers]
        return [MeteredLayer(layer, self, i) for i, layer in enumerate(layers)]

    def spent(self) -> dict[str, float]:
        """Shares of keys and bytes; 1.0 where nothing was counted."""
        return {
            "keys_share": self.keys_read / self.keys if self.keys else 1.0,
            "bytes_share": self.bytes_read / self.bytes if self.bytes else 1.0,
        }


@dataclass
class ErrorHistogram:
    """Relative errors by logarithm, their sum and count."""

    counts: list[int] = field(default_factory=lambda: [0] * BINS)
    total: float = 0.0
    number: int = 0

    def add(self, errors: Tensor) -> None:
        errors = errors.double().flatten()
        places = (errors.clamp(min=10.0**LOWEST).log10() - LOWEST) * BINS_PER_DECADE
        bins = places.long().clamp(0, BINS - 1)
        found = torch.bincount(bins, minlength=BINS).tolist()
        self.counts = [a + b for a, b in zip(self.counts, found, strict=True)]
        self.total += float(errors.sum())
        self.number += errors.numel()

    def merge(self, other: ErrorHistogram) -> None:
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.total, self.number = self.total + other.total, self.number + other.number

    @property
    def mean(self) -> float:
        return self.total / self.number if self.number else math.nan

    def quantile(self, share: float) -> float:
        """Upper edge of the bin that holds the quantile: at most an eighth too high."""
        if not self.number:
            return math.nan
        upto = itertools.accumulate(self.counts)
        place = next(i for i, seen in enumerate(upto) if seen >= share * self.number)
        return 10.0 ** (LOWEST + (place + 1) / BINS_PER_DECADE)

    def record(self) -> dict:
        """Sparse form for a result file."""
        bins = {str(i): count for i, count in enumerate(self.counts) if count}
        return {"bins": bins, "total": self.total, "number": self.number}

    @classmethod
    def of(cls, record: dict) -> ErrorHistogram:
        counts = [record["bins"].get(str(i), 0) for i in range(BINS)]
        return cls(counts, record["total"], record["number"])


@dataclass(frozen=True)
class MeteredLayer:
    """A method's layer that tells the meter what happens in it."""

    inner: ContextAttention
    meter: Meter
    index: int

    @property
    def layer(self) -> ClusteredLayer:
        return self.inner.layer

    @property
    def tokens(self) -> int:
        return self.inner.tokens

    @property
    def selectable_keys(self) -> int:
        return self.inner.selectable_keys

    def tensors(self) -> list[Tensor]:
        return self.inner.tensors()

    def index_bytes(self, query: Tensor, scale: float) -> float:
        return self.inner.index_bytes(query, scale)

    def attend(self, query, suffix_keys, suffix_values, suffix_mask, scale, per_token):
        rest = (suffix_keys, suffix_values, suffix_mask, scale, per_token)
        output, read = self.inner.attend(query, *rest)
        if per_token:
            self._count(query, read, scale)
            if self.meter.measure_errors:
                dense, _ = DenseLayer(self.layer).attend(query, *rest)
                away = (output.float() - dense.float()).norm(dim=-1)
                self.meter.errors[self.index].add(away / dense.float().norm(dim=-1).clamp(1e-12))
        return output, read

    def _count(self, query: Tensor, read: Tensor, scale: float) -> None:
        layer, meter = self.layer, self.meter
        queries, heads = query.shape[0] * query.shape[2], layer.keys.shape[0]
        row_bytes = layer.kv_bytes() / (layer.tokens * heads)
        keys_read = float(read.sum())
        meter.keys_read += keys_read
        meter.keys += queries * self.selectable_keys
        meter.bytes_read += (queries * layer.pinned * heads + keys_read) * row_bytes
        sample = query[:, :, :: -(-query.shape[2] // SAMPLED_ROWS)]
        index_bytes = self.index_bytes(sample, scale) * query.shape[2] / sample.shape[2]
        meter.bytes_read += index_bytes
        meter.bytes += queries * layer.kv_bytes()
