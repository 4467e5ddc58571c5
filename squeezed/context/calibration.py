"""What calibration leaves: thresholds for a grid of budgets, and the rule at one of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from squeezed.config import Preset, check_budget
from squeezed.context.rule import SelectionRule


@dataclass(frozen=True)
class Calibration:
    """Thresholds of one preset for a grid of budgets.

    Attributes:
        budgets: increasing shares of the clustered keys.
        per_token: per full-attention layer `[budgets, L, Hkv]` float64 log thresholds, for queries
            that select alone.
        per_block: the same for blocks of `preset.query_block` queries.
        alpha: per full-attention layer `[L, Hq]` float32, or `None` to first order.
        far_alpha: `[Hq]` each, or `None`: the same for the mass of dropped nodes.
    """

    preset: Preset
    budgets: tuple[float, ...]
    per_token: tuple[Tensor, ...]
    per_block: tuple[Tensor, ...]
    alpha: tuple[Tensor | None, ...]
    far_alpha: tuple[Tensor | None, ...]

    def rule(self, index: int, budget: float, block: bool) -> SelectionRule:
        """Rule of the `index`-th full-attention layer at `budget`, for a block or for one token."""
        grid = self.per_block if block else self.per_token
        return SelectionRule(
            log_thresholds=interpolate(self.budgets, grid[index], check_budget(budget)),
            alpha=self.alpha[index],
            far_field=self.preset.far_field,
            query_block=self.preset.query_block if block else 1,
            far_alpha=self.far_alpha[index],
        )


def interpolate(budgets: Sequence[float], grid: Tensor, budget: float) -> Tensor:
    """Log thresholds at `budget` from a grid `[budgets, ...]`, float32; 1.0 keeps every node.

    Linear in the logarithm of the budget; outside the grid the nearest interval is extended.
    """
    if budget >= 1.0:
        return torch.full_like(grid[0], -math.inf, dtype=torch.float32)
    if len(budgets) == 1:
        return grid[0].float()
    upper = min(max(1, sum(b < budget for b in budgets)), len(budgets) - 1)
    low, high = math.log(budgets[upper - 1]), math.log(budgets[upper])
    weight = (math.log(budget) - low) / (high - low)
    left, right = grid[upper - 1], grid[upper]
    mixed = left + weight * (right - left)
    return torch.where(left.isinf() | right.isinf(), right, mixed).float()
