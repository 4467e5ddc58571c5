"""A layer whose rows were chosen once, before any question came."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from squeezed.methods.masked import MaskedLayer, Queries


@dataclass(frozen=True)
class FixedLayer(MaskedLayer):
    """Reads the same rows for every query: `chosen [Hkv, R]` bool."""

    chosen: Tensor

    def keep(self, queries: Queries) -> Tensor:
        return self.chosen[None, :, None]
