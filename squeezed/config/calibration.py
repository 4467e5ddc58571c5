"""How a probe's queries become thresholds and weights of second-order terms."""

from __future__ import annotations

from dataclasses import dataclass, field

from squeezed.config.budget import rising
from squeezed.errors import SqueezedError, expect, shares, whole, within

ALPHA_RANGE = (0.0, 4.0)
"""Least and greatest weight of a second-order term."""


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
