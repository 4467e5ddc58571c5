"""Dense attention: the yardstick. Reads every key; row order does not matter to a softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from squeezed.context.layers import ClusteredLayer
from squeezed.context.record import ContextRecord
from squeezed.methods.base import ContextAttention
from squeezed.methods.masked import causal, masked_attention


@dataclass(frozen=True)
class DenseLayer(ContextAttention):
    """A layer that is read whole."""

    layer: ClusteredLayer

    def attend(
        self,
        query: Tensor,
        suffix_keys: Tensor,
        suffix_values: Tensor,
        suffix_mask: Tensor | None,
        scale: float,
        per_token: bool,
    ) -> tuple[Tensor, Tensor]:
        mask = causal(suffix_mask, query.shape[2], suffix_keys.shape[2], query.device)
        everything = torch.ones(1, dtype=torch.bool, device=query.device)
        shape = (query.shape[0], self.layer.keys.shape[0], query.shape[2], self.layer.clustered)
        suffix = (suffix_keys, suffix_values, mask)
        output = masked_attention(query, self.layer, everything.expand(shape), *suffix, scale)
        answered = mask.any(-1).sum((1, 2)).expand(query.shape[0])
        return output, answered * self.selectable_keys


@dataclass(frozen=True)
class Dense:
    """Every key, whatever the budget."""

    name = "dense"
    paper = "https://arxiv.org/abs/1706.03762"

    def prepare(self, context: ContextRecord, budget: float) -> list[DenseLayer]:
        return [DenseLayer(layer) for layer in context.clustered_layers]
