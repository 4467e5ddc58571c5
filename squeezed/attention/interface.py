"""The suffix: the user's and the generated tokens, which every implementation attends densely."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(rows: int, suffix: int, device: torch.device) -> Tensor:
    """`[1, 1, Q, S]` bool: the last `rows` of `suffix` tokens, each seeing what came before."""
    return torch.ones(rows, suffix, dtype=torch.bool, device=device).tril(suffix - rows)[None, None]
