"""What indexing is given: the keys, values and queries that a layer saw."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from squeezed.context.layers import ClusteredLayer


@dataclass(frozen=True)
class CapturedLayer:
    """One layer of a prefilled document.

    Attributes:
        keys, values: `[Hkv, P, D]` in document order (`[Hkv, W, D]` for a sliding window).
        queries: `[Hq, W, D]`, those of the probe; `None` for a sliding window. Where further
            layers read the same keys, their queries follow as more rows.
        scale: the layer's softmax scale.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor | None
    scale: float


def handed_over(layers: list[CapturedLayer]) -> Iterator[CapturedLayer]:
    """Every layer, taken out of the list: whoever takes one is then the only one to hold it."""
    layers.reverse()
    while layers:
        yield layers.pop()


@dataclass(frozen=True)
class ObservedLayer:
    """A clustered layer and the probe's queries there.

    Attributes:
        queries: `[Hq, W, D]`.
    """

    layer: ClusteredLayer
    queries: Tensor

    @property
    def scale(self) -> float:
        """The layer's softmax scale."""
        return self.layer.scale
