"""Routing Transformer's rule: a query attends only to the keys of its nearest centroids."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from squeezed.attention.scores import NEG_INF, of_owners, owners
from squeezed.context.bytes import LayerBytes
from squeezed.context.record import ContextRecord
from squeezed.methods.base import Blocks
from squeezed.methods.masked import MaskedLayer, Queries, fill


@dataclass(frozen=True)
class RoutingLayer(MaskedLayer):
    """Leaves of the tree ranked by the cosine of query and centroid."""

    def keep(self, queries: Queries) -> Tensor:
        leaves = self.layer.levels[-1]
        centroids = normalize(leaves.centroids.to(queries.q.dtype), dim=-1)
        cosines = torch.einsum("bhgqd,hcd->bhgqc", normalize(queries.q, dim=-1), centroids)
        cosines = cosines.masked_fill((leaves.sizes == 0)[:, None, None], NEG_INF)
        kept = fill(queries.shared(cosines), leaves.sizes, self.budget_keys)
        return of_owners(kept, owners(leaves.key_offsets, self.tokens)[:, self.layer.pinned :])

    def index_bytes(self, query: Tensor) -> Tensor | float:
        if not self.layer.levels:
            return 0.0
        leaves = self.layer.levels[-1]
        filled = (leaves.sizes > 0).sum()
        return query.shape[0] * query.shape[2] * filled * LayerBytes.of(self.layer).row


@dataclass(frozen=True)
class Routing:
    """Nearest clusters first until the budget is spent, in every head alike.

    Differences: the clusters are those of the fixed context's tree instead of learned ones; a query
    reads as many clusters as the budget allows instead of one.
    """

    name = "routing"
    paper = "https://arxiv.org/abs/2003.05997"

    def prepare(self, context: ContextRecord, budget: float) -> list[RoutingLayer]:
        return [
            RoutingLayer(layer, budget, Blocks.of(context)) for layer in context.clustered_layers
        ]
