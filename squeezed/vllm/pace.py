"""How much of a document is read in one step, so that no other request waits longer than allowed.

What a document adds to a step grows with its tokens there, and with what they look back at: so the
next piece follows from how long the last one took, beside the shortest, which shows what a request
takes anyway. Pieces are requests that leave their keys in vLLM's prefix cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

AIM = 0.8
"""Part of the limit that a step should take: what it takes is not quite foreseen."""

GROWTH = 2.0
"""Of a piece over the one before, at most."""


@dataclass
class Pace:
    """Pieces of one document.

    Attributes:
        limit: seconds that may be added to a step; 0 for any time.
        block: tokens of a block; pieces end with one, for only whole blocks are found again.
        most: tokens of the largest step.
        tokens: of the next piece; begins with a block, for nothing is known yet.
        done: tokens that were read.
        shortest: seconds of the shortest piece.
    """

    limit: float
    block: int
    most: int
    tokens: int = 0
    done: int = 0
    shortest: float = math.inf

    def __post_init__(self) -> None:
        self.tokens = self.block

    def next(self, left: int) -> int:
        """Tokens of the next piece when `left` must still be read; 0 for the last request, which
        computes little, for it also hands over all that was read."""
        if not self.limit or left <= self.block:
            return 0
        return min(self.tokens, (left - 1) // self.block * self.block)

    def took(self, tokens: int, seconds: float) -> None:
        """A piece was read.

        It is unknown how much of the time went into looking back, so the next piece is the largest
        for which the limit holds whether none of it did or all.
        """
        self.shortest = min(self.shortest, seconds)
        allowed = AIM * self.limit / max(seconds - self.shortest, 1e-6)
        pairs = allowed * tokens * (self.done + tokens / 2)
        self.done += tokens
        looking_back = math.sqrt(self.done**2 + 2 * pairs) - self.done
        wanted = int(min(allowed * tokens, looking_back, GROWTH * tokens))
        self.tokens = min(self._largest, max(self.block, wanted // self.block * self.block))

    @property
    def _largest(self) -> int:
        return max(self.block, self.most // self.block * self.block)
