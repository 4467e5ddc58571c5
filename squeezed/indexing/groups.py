"""Which layers are worked on together: as one layer that has the heads of all.

All heads are treated alike, so results are those of the layers one by one. A GPU with few keys to
work on waits for instructions; for several layers at once it needs them only once. On a CPU, layers
go side by side by threads (`squeezed.indexing.threads`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

KEYS_AT_ONCE = 1 << 20
"""Most keys, of all heads, of layers that are worked on together.

A million, a layer of 128K tokens with 8 KV heads or four of 32K, keep a GPU busy by themselves, and
what is held besides the keys grows with this number.
"""

LAYERS_AT_ONCE = 8
"""Most layers that are worked on together: short documents have histograms of scores as large."""


def shape_of(keys: Tensor, queries: Tensor, scale: float) -> tuple:
    """What layers must agree in: keys `[Hkv, P, D]`, queries `[Hq, W, D]` and scale."""
    return keys.shape, keys.dtype, queries.shape, scale


def in_groups(shapes: Sequence[tuple], device: torch.device) -> list[slice]:
    """Neighbouring layers that are worked on together, of equal shapes (`shape_of`)."""
    groups: list[slice] = []
    for place, shape in enumerate(shapes):
        heads, tokens = shape[0][:2]
        most = 1 if device.type == "cpu" else min(LAYERS_AT_ONCE, KEYS_AT_ONCE // (heads * tokens))
        last = groups[-1] if groups else slice(0, 0)
        if groups and place - last.start < most and shapes[last.start] == shape:
            groups[-1] = slice(last.start, place + 1)
        else:
            groups.append(slice(place, place + 1))
    return groups
