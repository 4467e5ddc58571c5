"""StreamingLLM: attention sinks and the most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass

from squeezed.context.record import ContextRecord
from squeezed.methods.base import Blocks
from squeezed.methods.fixed import FixedLayer
from squeezed.methods.masked import document_rank, top_rows


@dataclass(frozen=True)
class Streaming:
    """The pinned first tokens and a window before the pinned last ones.

    Differences: 16 sinks instead of 4, the same for every method here; positions are not
    renumbered, because the context's keys already carry theirs.
    """

    name = "streaming"
    paper = "https://arxiv.org/abs/2309.17453"

    def prepare(self, context: ContextRecord, budget: float) -> list[FixedLayer]:
        return [
            FixedLayer(
                layer,
                budget,
                Blocks.of(context),
                top_rows(document_rank(layer).double(), round(budget * layer.clustered)),
            )
            for layer in context.clustered_layers
        ]
