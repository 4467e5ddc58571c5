"""What an answer read: rows, bytes, and the budget of every head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from squeezed.attention.reference.lookup import lookup
from squeezed.context.bytes import LayerBytes
from squeezed.context.record import ContextRecord
from squeezed.errors import SqueezedError
from squeezed.hf.cache import SqueezedCache
from squeezed.hf.cache_layers import ContextLayer
from squeezed.hf.watched import Watched, WatchedLayer


@dataclass(frozen=True)
class Traffic:
    """Bytes of the context that one generated token reads, mean over the answer.

    Attributes:
        dense: all keys and values, again for every layer that reads those of another one.
        exact: keys and values read exactly, the pinned ones included.
        index: centroids and statistics of the nodes scored, mean values of those dropped.
    """

    dense: int
    exact: float
    index: float

    @property
    def total(self) -> float:
        return self.exact + self.index


def traffic(context: ContextRecord, cache: SqueezedCache | Watched) -> Traffic:
    """What one request's answer read per token. Needs `cache.watch_queries()` before asking.

    The exact keys are the ones that the cache counted, on the question and the answer alike.
    """
    index = exact = 0.0
    dense = float(context.kv_bytes())
    for entry in cache.context_layers:
        layer, query = entry.context.layer, answer_queries(entry)
        read, queries, answered = counted(entry)
        tokens = max(1, answered)
        dense += layer.kv_bytes() * (queries / tokens - 1)
        pinned = layer.pinned * layer.kv_heads * queries
        size = LayerBytes.of(layer)
        exact += (size.pinned(pinned) + size.keys(read)) / tokens
        if cache.budget < 1:
            per_query = float(entry.context.index_bytes(query)) / query.shape[2]
            index += per_query * queries / tokens
    return Traffic(round(dense), exact + context.window_bytes(), index)


def budget_by_head(context: ContextRecord, cache: SqueezedCache | Watched) -> Tensor:
    """Share of the clustered keys that the answer's tokens read, `[layers, Hkv]` float32."""
    rows = []
    for entry in cache.context_layers:
        read = rows_read(entry, answer_queries(entry))
        if read is None:
            raise SqueezedError("method: only squeezed attention spends a budget per head")
        clustered = read[:, entry.context.layer.pinned :]
        share = clustered.mean(1) if clustered.shape[1] else read.new_ones(len(read))
        rows.append(share.cpu())  # a document too short to cluster is read whole
    return torch.stack(rows)


def entries(answered: SqueezedCache | Watched) -> Sequence[ContextLayer | WatchedLayer]:
    return answered.context_layers


def counted(entry: ContextLayer | WatchedLayer) -> tuple[int, int, int]:
    """Keys read, queries and tokens answered."""
    read, queries, tokens = entry.counters()
    return int(read), int(queries), int(tokens)


QUERIES_AT_ONCE = 16
"""Query tokens scored together: memory is `Hq * 16 * P` floats."""


def answer_queries(entry: ContextLayer | WatchedLayer) -> Tensor:
    """Queries of one request's answer, `[1, Hq, N, D]`: each produced one of its tokens.

    The question's last token produced the first one; what came before it only read.
    """
    if not entry.watch:
        raise SqueezedError("cache: no queries were kept; call cache.watch_queries() before asking")
    first, *further = entry.watch
    return torch.cat([first[:1, :, -1:], *(query[:1] for query in further)], 2)


def rows_read(entry: ContextLayer | WatchedLayer, query: Tensor) -> Tensor | None:
    """Share of the queries that read each row exactly, `[Hkv, P]`; `None` without a tree.

    Args:
        query: `[1, Hq, N, D]`, each selecting alone.
    """
    rule = entry.context.rule
    if rule is None:
        return None
    layer = entry.context.layer
    share = torch.ones(layer.kv_heads, layer.tokens, device=layer.device)
    if not layer.levels:
        return share
    kept = torch.zeros(layer.levels[-1].sizes.shape, device=layer.device)
    for part in query.split(QUERIES_AT_ONCE, 2):
        kept += lookup(part, layer, rule).kept[0].sum(1)
    for head, sizes in enumerate(layer.levels[-1].sizes):
        share[head, layer.pinned :] = kept[head].repeat_interleave(sizes) / query.shape[2]
    return share
