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
        whole_tree: tokens below which a tree at the end is always clustered together with what is
            appended: clusters of a few tokens are poor.
        tail_share: of a tree and all that stands behind it, the most that may stand behind it;
            otherwise they are clustered together. So the first tree holds nearly all tokens, and a
            token is clustered again a few times while the text doubles. 1 joins small trees only.
        least_left: part of a tree that a cut must leave; otherwise what is left is clustered anew,
            for its nodes would be too many.
    """

    calibrate_share: float = 0.1
    whole_tree: int = 2048
    tail_share: float = 0.25
    least_left: float = 0.5

    def __post_init__(self) -> None:
        within("calibrate_share", self.calibrate_share, 0, 1)
        whole("whole_tree", self.whole_tree, 0)
        within("tail_share", self.tail_share, 1e-3, 1)
        within("least_left", self.least_left, 0, 1)
