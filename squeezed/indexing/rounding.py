"""What is below the rounding of its inputs is nothing: no spread, slope or scale is made of it."""

from __future__ import annotations

import torch
from torch import Tensor

SUM_ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Rounding of a sum of products, relative to the root of the product of both sums of squares."""

ROUNDING = 4 * SUM_ROUNDING
"""A difference of sums of squares below this share of them is rounding."""


def real_variance(variance: Tensor, whole: Tensor) -> Tensor:
    """Mean squares `variance` that are left of mean squares `whole`; 0 where rounding left them."""
    return variance.masked_fill(variance <= ROUNDING * whole, 0.0)
