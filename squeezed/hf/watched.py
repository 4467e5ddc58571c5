"""What a watched cache kept of one answer, which stays when the cache goes on to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from squeezed.hf.asking import Asking
from squeezed.hf.cache import SqueezedCache
from squeezed.methods.base import ContextAttention

if TYPE_CHECKING:
    from squeezed.hf.fixed_context import FixedContext


@dataclass(frozen=True)
class WatchedLayer:
    """One full-attention layer's part; all fields are those of its cache layer.

    Attributes:
        watch: queries `[B, Hq, Q, D]` of every pass, of the first one the last token's alone.
        keys_read, queries_answered, tokens_answered: counts over question and answer.
    """

    context: ContextAttention
    watch: tuple[Tensor, ...]
    keys_read: int
    queries_answered: int
    tokens_answered: int

    def counters(self) -> tuple[int, int, int]:
        """Keys read, queries and tokens answered, as of a cache layer."""
        return self.keys_read, self.queries_answered, self.tokens_answered


@dataclass(frozen=True)
class Watched:
    """Queries and counts of one answer, for `squeezed.answers.sources` and `.reading`."""

    record: FixedContext
    asking: Asking
    context_layers: tuple[WatchedLayer, ...]

    @property
    def budget(self) -> float:
        return self.asking.budget

    @classmethod
    def of(cls, record: FixedContext, asking: Asking, cache: SqueezedCache) -> Watched:
        """Of the answer that `cache`, made by `record.cache()`, has just given."""
        layers = []
        for layer in cache.context_layers:
            assert layer.watch is not None
            first, *further = layer.watch
            watch = (first[:1, :, -1:].clone(), *further)
            layers.append(WatchedLayer(layer.context, watch, *map(int, layer.counters())))
        return cls(record, asking, tuple(layers))
