"""The rule by which one layer selects: what calibration hands to the arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from squeezed.config import FarField


@dataclass(frozen=True)
class SelectionRule:
    """How the queries of one layer pick clusters.

    Attributes:
        log_thresholds: one per level, coarse to fine, in nats: a node is kept when the logarithm of
            the estimated softmax weight of one of its keys exceeds it. `-inf` keeps every node.
        alpha: `[L, Hq]` float32, weight of the second-order term per level and query head;
            `None` scores to first order.
        far_field: what dropped nodes contribute.
        query_block: query tokens that select together; 1 selects per token.
    """

    log_thresholds: tuple[float, ...]
    alpha: Tensor | None
    far_field: FarField
    query_block: int = 1
