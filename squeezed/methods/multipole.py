"""Multipole attention: exact near, one centroid per cluster far, coarser the farther."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from squeezed.attention.reference.lookup import Lookup
from squeezed.attention.scores import NEG_INF, far_means, grouped, of_owners, owners
from squeezed.attention.walk import scored_levels
from squeezed.context.record import ContextRecord
from squeezed.methods.base import Blocks
from squeezed.methods.masked import FarField, MaskedLayer, Queries, fill
from squeezed.methods.traffic import tree_bytes


@dataclass(frozen=True)
class MultipoleLayer(MaskedLayer):
    """A fixed number of keys per head is opened at every level; unopened nodes stand for theirs."""

    def descend(self, queries: Queries) -> Lookup:
        """Open the best nodes of level `l` of `L`, as many as hold `budget ** (l / L)` of keys."""
        far_logits, depth = [], len(self.layer.levels)
        for found in scored_levels(queries.q, self.layer):
            scores = queries.shared(found.first - found.first.logsumexp(-1, keepdim=True))
            share = self.budget ** ((found.depth + 1) / depth)
            wanted = round(share * self.layer.clustered)
            opened = fill(scores.masked_fill(~found.alive, NEG_INF), found.level.sizes, wanted)
            found.opened = opened
            closed = (found.alive & ~opened)[:, :, queries.blocks].unsqueeze(2)
            far_logits.append(found.log_mass.masked_fill(~closed, NEG_INF))
        means = far_means(self.layer, queries.q.dtype)
        return Lookup(opened, torch.cat(far_logits, -1), *means)

    def keep(self, queries: Queries) -> Tensor:
        owner = owners(self.layer.levels[-1].key_offsets, self.tokens)[:, self.layer.pinned :]
        return of_owners(self.descend(queries).kept, owner)

    def far_field(self, queries: Queries) -> FarField:
        found = self.descend(queries)
        valid = queries.valid[:, None, None, :, None]
        return found.far_logits.masked_fill(~valid, NEG_INF), found.far_values

    def index_bytes(self, query: Tensor) -> Tensor | float:
        if not self.layer.levels:
            return 0.0
        q = grouped(query, self.layer.kv_heads)
        valid = torch.ones(q.shape[0], q.shape[3], dtype=torch.bool, device=q.device)
        queries = Queries(q, valid, q.shape[3], self.layer.scale, self.blocks.query_block)
        return tree_bytes(self.layer, self.descend(queries), False, "first_order")


@dataclass(frozen=True)
class Multipole:
    """Near keys exactly, and every level's dropped nodes by centroid, size and mean value.

    Differences: near and far are measured by the query's score, as in the first paper, and the
    hierarchy is the second's (https://arxiv.org/abs/2310.11960), whose near means position.
    """

    name = "multipole"
    paper = "https://arxiv.org/abs/2506.13059"

    def prepare(self, context: ContextRecord, budget: float) -> list[MultipoleLayer]:
        return [
            MultipoleLayer(layer, budget, Blocks.of(context)) for layer in context.clustered_layers
        ]
