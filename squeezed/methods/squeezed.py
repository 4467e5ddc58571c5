"""Squeezed Attention itself: thresholds on cluster scores (arXiv 2411.09688)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from squeezed import ops
from squeezed.config import BEST
from squeezed.context import FixedContext
from squeezed.rule import SelectionRule
from squeezed.tree import ClusteredLayer


@dataclass(frozen=True)
class SqueezedLayer:
    """A clustered layer with the rules of one token and of a block of the user's tokens."""

    layer: ClusteredLayer
    token: SelectionRule
    block: SelectionRule
    implementation: str

    @property
    def tokens(self) -> int:
        return self.layer.tokens

    @property
    def selectable_keys(self) -> int:
        return self.layer.clustered * self.layer.keys.shape[0]

    def attend(
        self,
        query: Tensor,
        suffix_keys: Tensor,
        suffix_values: Tensor,
        suffix_mask: Tensor | None,
        scale: float,
        per_token: bool,
    ) -> tuple[Tensor, Tensor]:
        rule = self.token if per_token else self.block
        return ops.attend(
            query,
            self.layer,
            rule,
            suffix_keys,
            suffix_values,
            suffix_mask,
            scale=scale,
            implementation=self.implementation,
        )


@dataclass(frozen=True)
class Squeezed:
    """The method of this package, under one of a context's presets."""

    name = "squeezed"
    paper = "https://arxiv.org/abs/2411.09688"

    preset: str = BEST.name
    implementation: str = "auto"

    def prepare(self, context: FixedContext, budget: float) -> list[SqueezedLayer]:
        calibration = context.calibration(self.preset)
        return [
            SqueezedLayer(
                layer,
                token=calibration.rule(index, budget, block=False),
                block=calibration.rule(index, budget, block=True),
                implementation=self.implementation,
            )
            for index, layer in enumerate(context.clustered_layers)
        ]
