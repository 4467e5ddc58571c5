"""RetrievalAttention: every query head looks its keys up in a vector index."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from squeezed.attention.scores import NEG_INF, grouped
from squeezed.context.bytes import LayerBytes
from squeezed.context.layers import ClusteredLayer
from squeezed.context.record import ContextRecord
from squeezed.errors import SqueezedError
from squeezed.methods.base import Blocks
from squeezed.methods.masked import MaskedLayer, Queries, top_rows

LINKS = 32  # neighbours per key and layer of the graph; twice as many at its base
LINK_BYTES = 4
INDEXES = ("hnsw", "flat")


def build(keys: Tensor, kind: str) -> Any:
    """A faiss inner-product index over `keys [R, D]`.

    Raises:
        SqueezedError: faiss is not installed, or `kind` is not one of `INDEXES`.
    """
    try:
        import faiss
    except ImportError as error:
        raise SqueezedError(
            "retrieval: expected the package faiss-cpu, got none; "
            "pip install 'squeezed-attention[eval]'"
        ) from error
    if kind not in INDEXES:
        raise SqueezedError(f"index: expected one of {', '.join(INDEXES)}, got {kind!r}")
    dim = keys.shape[1]
    flat = kind == "flat"
    index: Any = faiss.IndexFlatIP(dim) if flat else None
    if index is None:
        index = faiss.IndexHNSWFlat(dim, LINKS, faiss.METRIC_INNER_PRODUCT)
    index.add(keys.float().cpu().contiguous().numpy())
    return index


def visited_keys(index: Any, queries: Tensor, count: int) -> tuple[float, float]:
    """Keys compared and graph nodes left through their links while finding `count` keys each."""
    import faiss

    statistics: Any = faiss.cvar
    if isinstance(index, faiss.IndexFlatIP):
        return float(queries.shape[0] * index.ntotal), 0.0
    statistics.hnsw_stats.reset()
    _search(index, queries, count)
    return float(statistics.hnsw_stats.ndis), float(statistics.hnsw_stats.nhops)


def _search(index: Any, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Scores and rows of the best keys of `queries [n, D]`, `[n, count]`; row -1 for none."""
    if hasattr(index, "hnsw"):
        index.hnsw.efSearch = max(64, count)
    scores, rows = index.search(queries.float().cpu().contiguous().numpy(), count)
    return torch.from_numpy(scores), torch.from_numpy(rows)


@dataclass(frozen=True)
class RetrievalLayer(MaskedLayer):
    """One index per KV head over its rows."""

    indexes: list

    def keep(self, queries: Queries) -> Tensor:
        shape = (*queries.q.shape[:-1], self.layer.clustered + 1)  # the last column takes misses
        found = queries.q.new_full(shape, NEG_INF)
        count = max(1, self.budget_keys)  # faiss wants to find something
        for head, index in enumerate(self.indexes):
            flat = queries.q[:, head].flatten(0, 2)
            scores, rows = (x.to(flat.device) for x in _search(index, flat, count))
            misses = rows < 0
            rows = rows.masked_fill(misses, self.layer.clustered)
            scores = (queries.scale * scores).masked_fill(misses, NEG_INF).to(found.dtype)
            slot = found.new_full((flat.shape[0], shape[-1]), NEG_INF).scatter(1, rows, scores)
            found[:, head] = slot.view(shape[0], *shape[2:])
        logits = found[..., :-1]
        scores = queries.shared(logits - logits.logsumexp(-1, keepdim=True))
        return top_rows(scores.nan_to_num(NEG_INF, NEG_INF, NEG_INF), self.budget_keys)

    def index_bytes(self, query: Tensor) -> Tensor | float:
        if not self.layer.clustered or not self.budget_keys:
            return 0.0
        q = grouped(query, self.layer.kv_heads)
        total = 0.0
        for head, index in enumerate(self.indexes):
            compared, hops = visited_keys(index, q[:, head].flatten(0, 2), self.budget_keys)
            total += compared * LayerBytes.of(self.layer).row + hops * 2 * LINKS * LINK_BYTES
        return total


@dataclass
class Retrieval:
    """Approximate nearest keys from a graph index (`hnsw`), or the exact ones (`flat`).

    Differences: faiss' HNSW graph over keys instead of the paper's graph built from queries; the
    heads of a group share the best of what they found, so that a KV head reads its budget. Bytes
    count every key that a search compares, once per query head, and the links it follows.
    The indexes of the last context are kept and serve every budget.
    """

    name = "retrieval"
    paper = "https://arxiv.org/abs/2409.10516"

    index: str = "hnsw"
    built: tuple[ContextRecord, list[list]] | None = field(default=None, init=False, repr=False)

    def prepare(self, context: ContextRecord, budget: float) -> list[RetrievalLayer]:
        if self.built is None or self.built[0] is not context:
            indexes = [self._indexes(layer) for layer in context.clustered_layers]
            self.built = (context, indexes)
        return [
            RetrievalLayer(layer, budget, Blocks.of(context), indexes)
            for layer, indexes in zip(context.clustered_layers, self.built[1], strict=True)
        ]

    def _indexes(self, layer: ClusteredLayer) -> list:
        if not layer.clustered:
            return []
        return [build(keys, self.index) for keys in layer.keys[:, layer.pinned :]]
