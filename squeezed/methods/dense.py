"""Dense attention: the yardstick. Reads every key; row order does not matter to a softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from squeezed.context import FixedContext
from squeezed.methods.masked import causal
from squeezed.tree import ClusteredLayer


@dataclass(frozen=True)
class DenseLayer:
    """A layer that is read whole."""

    layer: ClusteredLayer

    @property
    def tokens(self) -> int:
        return self.layer.tokens

    @property
    def selectable_keys(self) -> int:
        return self.layer.clustered * self.layer.keys.shape[0]

    def tensors(self) -> list[Tensor]:
        return self.layer.tensors()

    def index_bytes(self, query: Tensor, scale: float) -> float:
        return 0.0

    def attend(
        self,
        query: Tensor,
        suffix_keys: Tensor,
        suffix_values: Tensor,
        suffix_mask: Tensor | None,
        scale: float,
        per_token: bool,
    ) -> tuple[Tensor, Tensor]:
        batch, heads, rows, _ = query.shape
        mask = causal(suffix_mask, rows, suffix_keys.shape[2], query.device)
        valid = mask.any(-1, keepdim=True)  # padding attends to nothing
        mask = torch.cat([valid.expand(-1, -1, -1, self.tokens), mask], -1)
        keys = _joined(self.layer.keys, suffix_keys, heads)
        values = _joined(self.layer.values, suffix_values, heads)
        output = scaled_dot_product_attention(query, keys, values, mask, scale=scale)
        answered = valid[:, 0, :, 0].sum(-1).expand(batch)
        return output.masked_fill(~valid, 0.0), answered * self.selectable_keys


def _joined(context: Tensor, suffix: Tensor, heads: int) -> Tensor:
    """Context `[Hkv, P, D]` and suffix `[B, Hkv, S, D]` for every head, `[B, Hq, P + S, D]`."""
    rows = torch.cat([context.expand(suffix.shape[0], -1, -1, -1), suffix], 2)
    return rows.repeat_interleave(heads // context.shape[0], 1)


@dataclass(frozen=True)
class Dense:
    """Every key, whatever the budget."""

    name = "dense"
    paper = "https://arxiv.org/abs/1706.03762"

    def prepare(self, context: FixedContext, budget: float) -> list[DenseLayer]:
        return [DenseLayer(layer) for layer in context.clustered_layers]
