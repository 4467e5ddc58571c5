"""How a document's keys become a tree of clusters."""

from __future__ import annotations

from dataclasses import dataclass, field

from squeezed.errors import SqueezedError, expect, shares, whole, within


@dataclass(frozen=True)
class SpaceConfig:
    """How keys are compared when they are clustered (`squeezed.indexing.space`, DESIGN.md).

    Attributes:
        plain_share: part of the plain distance in the mixed one; the rest is what queries see.
        value_weight: root mean square distance between values, where that between keys is 1.
        value_dimensions: dimensions that values get, as a share of the keys'; more were no better.
        farthest: deviations that the mean compared key may be away.
    """

    plain_share: float = 0.35
    value_weight: float = 0.3
    value_dimensions: float = 0.25
    farthest: float = 10.0

    def __post_init__(self) -> None:
        within("plain_share", self.plain_share, 1e-3, 1)  # without any, a metric may have no factor
        within("value_weight", self.value_weight, 0, 1e3)
        within("value_dimensions", self.value_dimensions, 0, 1)
        within("farthest", self.farthest, 1e-3, 1e6)


@dataclass(frozen=True)
class ClusteringConfig:
    """How a document's keys become a tree of clusters.

    `levels` holds the number of clusters of each level as a share of the clustered tokens, coarse
    to fine: `(0.01, 0.05)` is the nested default, and any depth works. `levels=(0.05,)` with
    `query_space=False` is the flat clustering of arXiv 2411.09688.
    """

    levels: tuple[float, ...] = (0.01, 0.05)
    iterations: int = 5  # ten are no better (benchmarks/ACCURACY.md)
    query_space: bool = (
        True  # compare keys as queries see them, beside their values (indexing/space.py)
    )
    pinned_first: int = 16  # tokens; attention sinks, always read exactly
    pinned_last: int = 100  # tokens; what a question follows, always read exactly
    common_part: float = 2.0  # deviations from which on a mean is taken off the keys (DESIGN.md)
    space: SpaceConfig = field(default_factory=SpaceConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", shares("levels", self.levels))
        if not self.levels or any(not 0 < share <= 1 for share in self.levels):
            raise SqueezedError(
                f"levels: expected shares in (0, 1], coarse to fine, got {self.levels}"
            )
        if any(a >= b for a, b in zip(self.levels, self.levels[1:], strict=False)):
            raise SqueezedError(f"levels: every level must be finer than the last: {self.levels}")
        whole("iterations", self.iterations, 1)
        expect("query_space", self.query_space, bool, "True or False")
        whole("pinned_first", self.pinned_first, 0)
        whole("pinned_last", self.pinned_last, 0)
        within("common_part", self.common_part, 0, 1e6)
        expect("space", self.space, SpaceConfig, "a SpaceConfig")

    def pinned(self, tokens: int) -> tuple[int, int]:
        """How many of the first tokens are pinned, and how many of all."""
        first = min(self.pinned_first, tokens)
        return first, first + min(self.pinned_last, tokens - first)

    def counts(self, tokens: int) -> tuple[int, ...]:
        """Nodes per head of every level, coarse to fine; none if less than two would be left."""
        clustered = tokens - self.pinned(tokens)[1]
        counts = tuple(max(1, round(share * clustered)) for share in self.levels)
        return counts if counts[-1] >= 2 else ()
