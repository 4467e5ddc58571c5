"""Dense attention: the yardstick. Reads every key; row order does not matter to a softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from squeezed.context.record import ContextRecord
from squeezed.methods.base import Blocks
from squeezed.methods.masked import MaskedLayer, Queries


@dataclass(frozen=True)
class DenseLayer(MaskedLayer):
    """A layer that is read whole."""

    budget: float = 1.0
    blocks: Blocks = Blocks(1, 1)  # noqa: RUF009, it is frozen

    def keep(self, queries: Queries) -> Tensor:
        return torch.ones(1, dtype=torch.bool, device=queries.q.device)


@dataclass(frozen=True)
class Dense:
    """Every key, whatever the budget."""

    name = "dense"
    paper = "https://arxiv.org/abs/1706.03762"

    def prepare(self, context: ContextRecord, budget: float) -> list[DenseLayer]:
        return [DenseLayer(layer) for layer in context.clustered_layers]
