"""Random keys: the end of the scale that every method must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from squeezed.context.record import ContextRecord
from squeezed.methods.base import Blocks
from squeezed.methods.fixed import FixedLayer
from squeezed.methods.masked import top_rows


@dataclass(frozen=True)
class Random:
    """The same random keys of every KV head for all queries."""

    name = "random"
    paper = "none: a control"

    seed: int = 0

    def prepare(self, context: ContextRecord, budget: float) -> list[FixedLayer]:
        generator = torch.Generator().manual_seed(self.seed)
        layers = []
        for layer in context.clustered_layers:
            draws = torch.rand(layer.kv_heads, layer.clustered, generator=generator)
            chosen = top_rows(draws, round(budget * layer.clustered))
            layers.append(FixedLayer(layer, budget, Blocks.of(context), chosen.to(layer.device)))
        return layers
