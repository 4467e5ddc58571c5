"""Quest: pages of consecutive tokens, ranked by an upper bound of their keys' scores."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from squeezed.attention.scores import of_owners
from squeezed.context.record import ContextRecord
from squeezed.methods.base import Blocks
from squeezed.methods.masked import MaskedLayer, Queries, document_rank, fill

PAGE_TOKENS = 16  # the paper's


@dataclass(frozen=True)
class QuestLayer(MaskedLayer):
    """Pages over the document order of one layer's rows."""

    page_tokens: int = PAGE_TOKENS

    @cached_property
    def page(self) -> Tensor:
        """Page of every row, `[Hkv, R]`."""
        return document_rank(self.layer) // self.page_tokens

    @property
    def pages(self) -> int:
        return -(-self.layer.clustered // self.page_tokens)

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest key of every page per dimension, `[Hkv, C, D]` each."""
        keys = self.layer.keys[:, self.layer.pinned :]
        index = self.page[..., None].expand_as(keys)
        empty = keys.new_zeros(keys.shape[0], self.pages, keys.shape[2])
        low = empty.scatter_reduce(1, index, keys, "amin", include_self=False)
        return low, empty.scatter_reduce(1, index, keys, "amax", include_self=False)

    @cached_property
    def sizes(self) -> Tensor:
        """Rows in each page, `[Hkv, C]`; only the last may be short."""
        first = torch.arange(self.pages, device=self.page.device) * self.page_tokens
        return (self.layer.clustered - first).clamp(max=self.page_tokens).expand(len(self.page), -1)

    def bound_logits(self, queries: Queries) -> Tensor:
        """`s * sum over dimensions of max(q_d low_d, q_d high_d)`, `[B, Hkv, G, Q, C]`."""
        low, high = (bound.to(queries.q.dtype) for bound in self.bounds)
        up = torch.einsum("bhgqd,hcd->bhgqc", queries.q.clamp(min=0), high)
        down = torch.einsum("bhgqd,hcd->bhgqc", queries.q.clamp(max=0), low)
        return queries.scale * (up + down)

    def keep(self, queries: Queries) -> Tensor:
        scores = queries.shared(self.bound_logits(queries).log_softmax(-1))
        return of_owners(fill(scores, self.sizes, self.budget_keys), self.page)

    def index_bytes(self, query: Tensor) -> Tensor | float:
        tokens = query.shape[0] * query.shape[2]
        return tokens * sum(bound.numel() * bound.element_size() for bound in self.bounds)


@dataclass(frozen=True)
class Quest:
    """Query-aware page selection.

    Differences: the first two layers are not left dense, so that a budget means the same for every
    method; the heads of a group share pages, by the largest of their normalised bounds.
    """

    name = "quest"
    paper = "https://arxiv.org/abs/2406.10774"

    page_tokens: int = PAGE_TOKENS

    def prepare(self, context: ContextRecord, budget: float) -> list[QuestLayer]:
        return [
            QuestLayer(layer, budget, Blocks.of(context), self.page_tokens)
            for layer in context.clustered_layers
        ]
