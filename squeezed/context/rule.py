"""The rule by which one layer selects: what calibration hands to the arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from squeezed.config import FarField
from squeezed.context.layers import ClusteredLayer
from squeezed.errors import SqueezedError


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
        far_alpha: `[Hq]` float32, weight of the second-order term in their mass, at all levels
            alike, where `far_field` is of second order.
        query_block: query tokens that select together; 1 selects per token.
    """

    log_thresholds: Tensor
    alpha: Tensor | None
    far_field: FarField
    query_block: int = 1
    far_alpha: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.far_field == "second_order") != (self.far_alpha is not None):
            raise SqueezedError(
                f"far_alpha: expected a tensor exactly with far_field 'second_order', got "
                f"{'none' if self.far_alpha is None else 'one'} with {self.far_field!r}"
            )

    def tensors(self) -> list[Tensor]:
        """All that a kernel reads: a CUDA graph holds them in place."""
        held = (self.log_thresholds, self.alpha, self.far_alpha)
        return [tensor for tensor in held if tensor is not None]

    def of_heads(self, own: slice) -> SelectionRule:
        """The rule of some KV heads alone."""
        heads = self.log_thresholds.shape[1]
        alpha, far_alpha = (
            None if a is None else a.unflatten(-1, (heads, -1))[..., own, :].flatten(-2)
            for a in (self.alpha, self.far_alpha)
        )
        thresholds = self.log_thresholds[:, own]
        return replace(self, log_thresholds=thresholds, alpha=alpha, far_alpha=far_alpha)

    @classmethod
    def for_all_heads(
        cls,
        log_thresholds: Sequence[float],
        layer: ClusteredLayer,
        alpha: Tensor | None,
        far_field: FarField,
        query_block: int = 1,
        far_alpha: Tensor | None = None,
    ) -> SelectionRule:
        """The rule of `layer` whose KV heads share one threshold per level."""
        column = torch.tensor(log_thresholds, dtype=torch.float32, device=layer.device)
        heads = layer.kv_heads
        thresholds = column[:, None].repeat(1, heads)
        return cls(thresholds, alpha, far_field, query_block, far_alpha)
