"""Logits -> a token, for one row: greedy, or drawn with a generator of the row's own."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import torch
from torch import Tensor

from squeezed.server.port import Sampling
from squeezed.server.refusals import Refusal

LEAST_TEMPERATURE = 1e-4
"""Below it the likeliest token is drawn anyway, and quotients may pass what numbers can hold."""


@dataclass(frozen=True)
class Chosen:
    """A token, and of what was asked for: its logarithm of probability, and the likeliest ones'."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Chooser:
    """Chooses the tokens of one answer.

    What is drawn depends on the seed and the logits alone, not on other rows.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.generator: torch.Generator | None = None
        if sampling.temperature >= LEAST_TEMPERATURE:
            seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
            self.generator = torch.Generator().manual_seed(seed & (2**63 - 1))

    def choose(self, logits: Tensor) -> Chosen:
        """From the logits of all tokens, `[V]` float32 on the CPU.

        Raises:
            Refusal: the model gave no numbers.
        """
        if bool(logits.isnan().any()):
            raise Refusal(500, "the model's numbers for this request are none (NaN)", None, "nan")
        token = int(logits.argmax()) if self.generator is None else self._drawn(logits)
        told = self.sampling.logprobs
        if told is None:
            return Chosen(token)
        logprobs = logits.log_softmax(-1)
        values, ids = logprobs.topk(min(told, len(logits)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return Chosen(token, float(logprobs[token]), top)

    def _drawn(self, logits: Tensor) -> int:
        chances = (logits.double() / self.sampling.temperature).softmax(-1)
        if self.sampling.top_p < 1:
            chances, order = chances.sort(descending=True)
            before = chances.cumsum(-1) - chances
            chances = chances.masked_fill(before >= self.sampling.top_p, 0.0)
            return int(order[torch.multinomial(chances, 1, generator=self.generator)])
        return int(torch.multinomial(chances, 1, generator=self.generator))
