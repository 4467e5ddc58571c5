"""How a query uses the tree."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Literal

from squeezed.errors import SqueezedError, expect, whole

FarField = Literal["none", "first_order", "second_order"]
FAR_FIELDS: tuple[FarField, ...] = ("none", "first_order", "second_order")


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
