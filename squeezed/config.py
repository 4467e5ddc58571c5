"""Every setting, and every number that shapes an index, with its unit.

The records are frozen, and bad values raise here. A saved context holds all of `IndexConfig`, so it
says with what it was made; how much is worked on at once, which changes no result, is not among it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Real
from typing import Literal

from squeezed.errors import SqueezedError, expect, shares, whole, within

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
    single_tokens: int = 128
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
class ProbeConfig:
    """The question that calibrates: what people ask of any text, and two excerpts of this one.

    Attributes:
        question: what stands before the excerpts.
        excerpt_characters: length of each.
    """

    question: str = (
        "What is this about, and what are its main points? Which names, numbers, dates and places "
        "does it give, and what do they mean? How does it work, why was it done, and what are the "
        "exceptions? Explain the most important part in a few sentences, and say where it is "
        "described."
    )
    excerpt_characters: int = 120

    def __post_init__(self) -> None:
        expect("question", self.question, str, "text")
        whole("excerpt_characters", self.excerpt_characters, 0)


@dataclass(frozen=True)
class TrialConfig:
    """How every head is tried out at several shares of its keys (`squeezed.indexing.trials`).

    Attributes:
        shares: of a head's keys, rising, at which its error is measured.
        far_fitted_at: which of them, from 0, serves to fit the far field.
        far_parts: parts of alpha that the mass of dropped nodes may get.
        queries: observed ones per head, at least.
    """

    shares: tuple[float, ...] = (0.005, 0.015, 0.04, 0.1, 0.2, 0.4, 0.7, 0.92)
    far_fitted_at: int = 2
    far_parts: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    queries: int = 24

    def __post_init__(self) -> None:
        object.__setattr__(self, "shares", rising("shares", self.shares))
        object.__setattr__(self, "far_parts", shares("far_parts", self.far_parts))
        if not self.far_parts or any(not 0 <= part <= 1 for part in self.far_parts):
            raise SqueezedError(f"far_parts: expected parts in [0, 1], got {self.far_parts}")
        if whole("far_fitted_at", self.far_fitted_at, 0) >= len(self.shares):
            raise SqueezedError(
                f"far_fitted_at: expected one of {len(self.shares)} shares, from 0, got "
                f"{self.far_fitted_at}"
            )
        whole("queries", self.queries, 1)


@dataclass(frozen=True)
class AllotmentConfig:
    """How the budget is shared out by error (`squeezed.indexing.allotment`).

    Attributes:
        first_layer_weight: how much more an error of the first layer counts: all others build on
            it.
        least_share: part of the budget that every layer gets at least: a probe is short, and may
            not ask what a question asks (DESIGN.md).
        steps: shares that a head may get, evenly spaced by logarithm up to all keys.
    """

    first_layer_weight: float = 3.0
    least_share: float = 0.65
    steps: int = 97

    def __post_init__(self) -> None:
        within("first_layer_weight", self.first_layer_weight, 0, 1e6)
        within("least_share", self.least_share, 0, 1)
        whole("steps", self.steps, 2)


@dataclass(frozen=True)
class HistogramConfig:
    """Where thresholds may lie (`squeezed.indexing.thresholds`): nats, and how many bins.

    By default a bin is 0.01 nats wide.
    """

    lowest: float = -60.0
    highest: float = 4.0
    bins: int = 6400

    def __post_init__(self) -> None:
        within("lowest", self.lowest, -1e6, 1e6)
        within("highest", self.highest, -1e6, 1e6)
        if self.lowest >= self.highest:
            raise SqueezedError(f"highest: expected above {self.lowest} nats, got {self.highest}")
        whole("bins", self.bins, 2)


@dataclass(frozen=True)
class CalibrationConfig:
    """How a probe's queries become thresholds and weights of second-order terms.

    Attributes:
        alpha_queries: observed ones per layer, at least, that fit alpha; more changed nothing
            measurable.
    """

    probe: ProbeConfig = field(default_factory=ProbeConfig)
    alpha_queries: int = 24
    trials: TrialConfig = field(default_factory=TrialConfig)
    allotment: AllotmentConfig = field(default_factory=AllotmentConfig)
    scores: HistogramConfig = field(default_factory=HistogramConfig)

    def __post_init__(self) -> None:
        whole("alpha_queries", self.alpha_queries, 1)
        for name, kind in (
            ("probe", ProbeConfig),
            ("trials", TrialConfig),
            ("allotment", AllotmentConfig),
            ("scores", HistogramConfig),
        ):
            article = "an" if kind is AllotmentConfig else "a"
            expect(name, getattr(self, name), kind, f"{article} {kind.__name__}")


@dataclass(frozen=True)
class IndexConfig:
    """Everything that `squeezed.index` decides."""

    clustering: ClusteringConfig = field(default_factory=ClusteringConfig)
    presets: tuple[Preset, ...] = (PAPER, BEST)
    budgets: tuple[float, ...] = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75)
    prefill_chunk: int = 1024  # document tokens per forward pass
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)

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
        object.__setattr__(self, "budgets", rising("budgets", self.budgets))
        expect("calibration", self.calibration, CalibrationConfig, "a CalibrationConfig")


def rising(name: str, values: tuple[float, ...]) -> tuple[float, ...]:
    """Increasing shares in (0, 1) as a tuple, or raise `SqueezedError`."""
    found = shares(name, values)
    if not found or any(not 0 < share < 1 for share in found):
        raise SqueezedError(f"{name}: expected shares in (0, 1), got {found}")
    if tuple(sorted(set(found))) != found:
        raise SqueezedError(f"{name}: expected increasing values, got {found}")
    return found


def check_budget(budget: float) -> float:
    """Return `budget` as a float in (0, 1], or raise `SqueezedError`."""
    if isinstance(budget, bool) or not isinstance(budget, Real) or not 0 < budget <= 1:
        raise SqueezedError(
            f"budget: expected a share of the context's keys in (0, 1], got {budget!r}; "
            "0.1 reads a tenth, 1.0 is dense attention"
        )
    return float(budget)
