"""All trees of a document: layers that are worked on together stand joined as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from squeezed.context.captured import ObservedLayer


@dataclass(frozen=True)
class Forest:
    """The layers with full attention, clustered, in the model's order.

    Attributes:
        joined: neighbouring layers of one shape as one layer that has the heads of all, one layer's
            after the other's.
        layers_in: how many layers each of them holds.
    """

    joined: tuple[ObservedLayer, ...]
    layers_in: tuple[int, ...]

    @classmethod
    def of(cls, layers: Sequence[ObservedLayer]) -> Forest:
        """Layers that nobody joined."""
        return cls(tuple(layers), (1,) * len(layers))

    @property
    def heads(self) -> list[int]:
        """KV heads of every joined layer."""
        return [seen.layer.kv_heads for seen in self.joined]

    @property
    def layer_of_head(self) -> Tensor:
        """The layer to which every KV head belongs, `[N]` int64 on the CPU, counted from 0."""
        each = zip(self.heads, self.layers_in, strict=True)
        counts = [heads // layers for heads, layers in each for _ in range(layers)]
        return torch.repeat_interleave(torch.tensor(counts, dtype=torch.int64))

    def layers(self) -> list[ObservedLayer]:
        """Every layer by itself, as views."""
        return [
            own for pair in zip(self.joined, self.layers_in, strict=True) for own in _cut(*pair)
        ]

    def apart(self, found: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Per layer what was found for the joined ones, whose heads are the last dimension."""
        return [
            own
            for count, of_joined in zip(self.layers_in, found, strict=True)
            for own in ([None] * count if of_joined is None else of_joined.chunk(count, -1))
        ]


def _cut(seen: ObservedLayer, count: int) -> list[ObservedLayer]:
    heads = seen.layer.kv_heads // count
    trees = (seen.layer.of_heads(slice(h, h + heads)) for h in range(0, count * heads, heads))
    queries = seen.queries.chunk(count)
    return [ObservedLayer(*pair) for pair in zip(trees, queries, strict=True)]
