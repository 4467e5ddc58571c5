"""The rule by which one layer selects: what calibration hands to the arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from squeezed.config import FarField
from squeezed.tree import ClusteredLayer


@dataclass(frozen=True)
class SelectionRule:
    """How the queries of one layer pick clusters.

    Attributes:
        log_thresholds: `[L, Hkv]` float32, coarse to fine, in nats: a node is kept when the
            logarithm of the estimated softmax weight of one of its keys exceeds that of its level
            and KV head. `-inf` keeps every node.
        alpha: `[L, Hq]` float32, weight of the second-order term per level and query head;
            `None` scores to first order.
        far_field: what dropped nodes contribute.
        query_block: query tokens that select together; 1 selects per token.
    """

    log_thresholds: Tensor
    alpha: Tensor | None
    far_field: FarField
    query_block: int = 1

    @classmethod
    def for_all_heads(
        cls,
        log_thresholds: Sequence[float],
        layer: ClusteredLayer,
        alpha: Tensor | None,
        far_field: FarField,
        query_block: int = 1,
    ) -> SelectionRule:
        """The rule of `layer` whose KV heads share one threshold per level."""
        column = torch.tensor(log_thresholds, dtype=torch.float32, device=layer.keys.device)
        heads = layer.keys.shape[0]
        return cls(column[:, None].repeat(1, heads), alpha, far_field, query_block)
