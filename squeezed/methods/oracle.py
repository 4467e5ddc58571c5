"""The oracle: the keys with the largest true softmax weights, which no method can know."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from squeezed.context.record import ContextRecord
from squeezed.methods.base import Blocks
from squeezed.methods.masked import MaskedLayer, Queries, top_rows


@dataclass(frozen=True)
class OracleLayer(MaskedLayer):
    """Shares the budget among the KV heads of a layer by weight; drops the rest without trace."""

    def keep(self, queries: Queries) -> Tensor:
        weights = queries.logits(self.layer.keys).log_softmax(-1)[..., self.layer.pinned :]
        scores = queries.shared(weights)  # [B, Hkv, N, R]
        joint = scores.transpose(1, 2).flatten(2)
        kept = top_rows(joint, self.budget_keys * scores.shape[1])
        return kept.unflatten(2, (scores.shape[1], -1)).transpose(1, 2)


@dataclass(frozen=True)
class Oracle:
    """Exact top keys per layer. Bytes are those of the chosen keys: the choice comes for free."""

    name = "oracle"
    paper = "none: an upper end"

    def prepare(self, context: ContextRecord, budget: float) -> list[OracleLayer]:
        return [
            OracleLayer(layer, budget, Blocks.of(context)) for layer in context.clustered_layers
        ]
