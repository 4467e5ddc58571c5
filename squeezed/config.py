"""The settings that a caller may choose, with their units; frozen, and bad values raise here."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Real
from typing import Literal

from squeezed.errors import SqueezedError, expect, shares, whole

SEQUENCE = (tuple, list)

FarField = Literal["none", "first_order", "second_order"]
FAR_FIELDS: tuple[FarField, ...] = ("none", "first_order", "second_order")

DEFAULT_BUDGET = 0.1
"""Share of the context's clustered keys that a query reads exactly."""

ALPHA_RANGE = (0.0, 4.0)
"""Least and greatest weight of a second-order term."""

DEFAULT_NEW_TOKENS = 128
"""Longest answer, in tokens, unless asked otherwise."""


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

    def pinned(self, tokens: int) -> tuple[int, int]:
        """How many of the first tokens are pinned, and how many of all."""
        first = min(self.pinned_first, tokens)
        return first, first + min(self.pinned_last, tokens - first)

    def counts(self, tokens: int) -> tuple[int, ...]:
        """Nodes per head of every level, coarse to fine; none if less than two would be left."""
        clustered = tokens - self.pinned(tokens)[1]
        counts = tuple(max(1, round(share * clustered)) for share in self.levels)
        return counts if counts[-1] >= 2 else ()


@dataclass(frozen=True)
class Preset:
    """How a query uses the tree: which score selects, and what a dropped cluster still counts.

    Attributes:
        second_order: add the calibrated variance term to the score that selects.
        far_field: what dropped clusters contribute: nothing; their mean value with the mass of
            their mean key; or, to second order, a mass that knows their keys' variance and a value
            moved to where the query pulls.
        coarse_share: a level above one that keeps a share `b` of the keys keeps
            `min(1, coarse_share * sqrt(b))`; `None` prunes nothing, so that every leaf is scored.
        per_head: thresholds of their own for every KV head, at the shares of the keys with which
            outputs err least together (`squeezed.indexing.allotment`); otherwise one for all.
        single_tokens: the last tokens of an input that select alone; earlier ones select in blocks.
        query_block: query tokens that select together in a block.
    """

    name: str
    second_order: bool
    far_field: FarField
    coarse_share: float | None
    per_head: bool = False
    single_tokens: int = 64
    query_block: int = 64

    def __post_init__(self) -> None:
        expect("name", self.name, str, "a preset's name (str)")
        for name in ("second_order", "per_head"):
            expect(name, getattr(self, name), bool, "True or False")
        if self.far_field not in FAR_FIELDS:
            raise SqueezedError(f"far_field: expected one of {FAR_FIELDS}, got {self.far_field!r}")
        if self.far_field == "second_order" and not self.second_order:
            raise SqueezedError("far_field: 'second_order' needs second_order=True")
        share = expect("coarse_share", self.coarse_share, (Real, type(None)), "a number or None")
        if share is not None and not 1 <= share < float("inf"):
            raise SqueezedError(f"coarse_share: expected at least 1, got {share}")
        whole("single_tokens", self.single_tokens, 1)
        whole("query_block", self.query_block, 1)


PAPER = Preset("paper", second_order=False, far_field="none", coarse_share=None)
BEST = Preset("best", second_order=True, far_field="second_order", coarse_share=1.25, per_head=True)
PRESETS: dict[str, Preset] = {preset.name: preset for preset in (PAPER, BEST)}


@dataclass(frozen=True)
class IndexConfig:
    """Everything that `squeezed.index` decides."""

    clustering: ClusteringConfig = field(default_factory=ClusteringConfig)
    presets: tuple[Preset, ...] = (PAPER, BEST)
    budgets: tuple[float, ...] = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75)
    prefill_chunk: int = 1024  # document tokens per forward pass

    def __post_init__(self) -> None:
        wanted = "presets such as squeezed.config.BEST"
        expect("clustering", self.clustering, ClusteringConfig, "a ClusteringConfig")
        object.__setattr__(
            self, "presets", tuple(expect("presets", self.presets, SEQUENCE, wanted))
        )
        for preset in self.presets:
            expect("presets", preset, Preset, wanted)
        if len({preset.name for preset in self.presets}) < max(1, len(self.presets)):
            raise SqueezedError(f"presets: expected {wanted}, each once, got {self.presets}")
        whole("prefill_chunk", self.prefill_chunk, 1)
        object.__setattr__(self, "budgets", shares("budgets", self.budgets))
        if not self.budgets or any(not 0 < b < 1 for b in self.budgets):
            raise SqueezedError(f"budgets: expected shares in (0, 1), got {self.budgets}")
        if tuple(sorted(set(self.budgets))) != self.budgets:
            raise SqueezedError(f"budgets: expected increasing values, got {self.budgets}")


def check_budget(budget: float) -> float:
    """Return `budget` as a float in (0, 1], or raise `SqueezedError`."""
    if isinstance(budget, bool) or not isinstance(budget, Real) or not 0 < budget <= 1:
        raise SqueezedError(
            f"budget: expected a share of the context's keys in (0, 1], got {budget!r}; "
            "0.1 reads a tenth, 1.0 is dense attention"
        )
    return float(budget)
