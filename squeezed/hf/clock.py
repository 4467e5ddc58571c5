"""When tokens came: a stopping criterion that never stops."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor


class Clock:
    """Notes the time at which `generate()` shows it each token, and how many there were.

    Attributes:
        waits: for the GPU before it looks; `generate()` waits for each token anyway, a step later.
        times: seconds of a running clock; the first is that of the start.
        lengths: tokens at each time, the prompt's included; 0 at the start.
    """

    def __init__(self, waits: bool = False) -> None:
        self.waits = waits
        self.start()

    def start(self) -> None:
        self.times, self.lengths = [time.perf_counter()], [0]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.waits and input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        self.lengths.append(input_ids.shape[1])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def seconds(self) -> dict[str, float]:
        """From the start to the first token, and per token after it."""
        if len(self.times) == 1:
            return {"first_token": 0.0, "per_token": 0.0}
        further = self.lengths[-1] - self.lengths[1]
        decoding = (self.times[-1] - self.times[1]) / further if further > 0 else 0.0
        return {"first_token": self.times[1] - self.times[0], "per_token": decoding}

    def steps_ms(self, skip: int) -> list[float]:
        """Milliseconds from token to token, without the first `skip`."""
        steps = [1e3 * (b - a) for a, b in zip(self.times[1:], self.times[2:], strict=False)]
        return steps[skip:]
