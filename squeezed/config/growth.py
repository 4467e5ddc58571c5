"""How a context grows."""

from __future__ import annotations

from dataclasses import dataclass

from squeezed.errors import whole, within

FOLD_AT = 2048
"""Tokens of a conversation beyond which the oldest of them are clustered."""

LEAST_FOLDED = 64
"""Fewer tokens are not worth a cluster."""


@dataclass(frozen=True)
class GrowthConfig:
    """How a context grows (`squeezed.hf.growing`).

    Attributes:
        calibrate_share: of the tokens that may come and go before thresholds are fitted anew.
        whole_tree: tokens from which on a tree is left alone. Smaller ones at the end are clustered
            together with what is appended, for the last clusters of a short text are poor.
        least_left: part of a tree that a cut must leave; otherwise what is left is clustered anew,
            for its nodes would be too many.
    """

    calibrate_share: float = 0.1
    whole_tree: int = 2048
    least_left: float = 0.5

    def __post_init__(self) -> None:
        within("calibrate_share", self.calibrate_share, 0, 1)
        whole("whole_tree", self.whole_tree, 0)
        within("least_left", self.least_left, 0, 1)
