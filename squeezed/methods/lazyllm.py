"""LazyLLM: tokens drop out progressively over the layers, by the attention of the last token."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from squeezed.attention.scores import NEG_INF
from squeezed.context.record import ContextRecord
from squeezed.methods.base import Blocks
from squeezed.methods.masked import MaskedLayer, Queries, document_rank, top_rows


@dataclass
class Survivors:
    """Tokens that the layers so far kept, `[B, N, R]` bool in document order; all at first."""

    alive: Tensor | None = None


@dataclass(frozen=True)
class LazyLayer(MaskedLayer):
    """One layer of the cascade: reads the survivors, then chooses those of the next layer."""

    first: bool
    next_keys: int
    survivors: Survivors = field(compare=False)

    def keep(self, queries: Queries) -> Tensor:
        batch, blocks = queries.q.shape[0], queries.count
        place = self.place[None, :, None].expand(batch, -1, blocks, -1)
        if self.first:
            shape = (batch, blocks, self.layer.clustered)
            self.survivors.alive = torch.ones(shape, dtype=torch.bool, device=place.device)
        alive = self.survivors.alive
        assert alive is not None  # the first layer came before
        keep = alive[:, None].expand(-1, place.shape[1], -1, -1).gather(3, place)
        self.survivors.alive = self._choose(queries, keep, place, alive)
        return keep

    @cached_property
    def place(self) -> Tensor:
        """Rank in the document of every row, `[Hkv, R]`."""
        return document_rank(self.layer)

    def _choose(self, queries: Queries, keep: Tensor, place: Tensor, alive: Tensor) -> Tensor:
        """The tokens with the most attention, over all heads, from each block's last token."""
        last = _last_rows(queries)
        logits = queries.logits(self.layer.keys)[:, :, :, last]  # [B, Hkv, G, N, P]
        logits[..., self.layer.pinned :].masked_fill_(~keep.unsqueeze(2), NEG_INF)
        weights = logits.softmax(-1)[..., self.layer.pinned :].mean(2)
        in_document = torch.zeros_like(weights).scatter(3, place, weights).mean(1)
        return top_rows(in_document.masked_fill(~alive, NEG_INF), self.next_keys)


def _last_rows(queries: Queries) -> Tensor:
    """Index of the last row of every block."""
    device, blocks = queries.q.device, queries.count - queries.single
    back = torch.arange(blocks - 1, -1, -1, device=device) * queries.query_block
    alone = torch.arange(queries.early, queries.early + queries.single, device=device)
    return torch.cat([queries.early - 1 - back, alone])


def shares(budget: float, layers: int) -> list[float]:
    """Geometric shares from 1 in the first layer whose mean is `budget`, or as near as 1 allows."""
    low, high = 0.0, 1.0
    for _ in range(60):
        ratio = (low + high) / 2
        mean = sum(ratio**i for i in range(layers)) / layers
        low, high = (ratio, high) if mean < budget else (low, ratio)
    return [high**i for i in range(layers)]


@dataclass(frozen=True)
class LazyLLM:
    """Progressive token pruning of the fixed context, anew for every block or token.

    Differences: the document was prefilled whole, so what is pruned is what the question and
    the answer read of it; layers shrink geometrically instead of at chosen depths; a block of
    the user's tokens prunes by its own last token. The first layer reads everything, so a budget
    below one layer's share cannot be met, and the spending says so.
    """

    name = "lazyllm"
    paper = "https://arxiv.org/abs/2407.14057"

    def prepare(self, context: ContextRecord, budget: float) -> list[LazyLayer]:
        layers, survivors = context.clustered_layers, Survivors()
        plan = [*shares(budget, len(layers)), 0.0]
        return [
            LazyLayer(
                layer,
                budget,
                Blocks.of(context),
                i == 0,
                round(plan[i + 1] * layer.clustered),
                survivors,
            )
            for i, layer in enumerate(layers)
        ]
