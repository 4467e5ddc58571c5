"""Keys and values of a few tokens: what a model does, however its code and storage bring it about.

A sketch of weights does not see an adapter of unknown make, a hook, or an activation function.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from squeezed.hf.identity.sketch import noise, type_name
from squeezed.hf.support import input_device
from squeezed.hf.switch import using_attention

TOKENS, PROJECTIONS = 16, 4

TOLERANCE = {"float64": 2e-3, "float32": 2e-3, "float16": 0.05, "bfloat16": 0.2}
"""How far keys and values may be apart, over their norm: by the coarser type of both sides."""

ROUNDED_TOLERANCE, PACKED_TOLERANCE = 0.2, 0.5
"""The same where weights were rounded to 16 bits on one side, or are stored in fewer."""


@dataclass(frozen=True)
class Behaviour:
    """Projections of the keys and values of `ids`.

    Attributes:
        ids: token ids, `TOKENS` of them.
        dtype: name of the keys' type.
        projected: `[L, 2, TOKENS, PROJECTIONS]` float32.
    """

    ids: tuple[int, ...]
    dtype: str
    projected: np.ndarray

    def is_near(self, other: Behaviour, exact: bool, packed: bool) -> bool:
        """Whether keys and values are equal but for rounding, in every layer.

        Args:
            exact: whether the weights of both are equal in every bit.
            packed: whether one side stores its weights in 8 bits or fewer.
        """
        if self.projected.shape != other.projected.shape:
            return False
        tolerance = max(TOLERANCE.get(seen.dtype, ROUNDED_TOLERANCE) for seen in (self, other))
        tolerance = tolerance if exact else max(tolerance, ROUNDED_TOLERANCE)
        tolerance = PACKED_TOLERANCE if packed else tolerance
        return bool((self.distances(other) <= tolerance).all())

    def distances(self, other: Behaviour) -> np.ndarray:
        """`[L, 2]`, the median over tokens of the relative distance of keys, and of values."""
        mine, its = self.projected, other.projected
        size = np.linalg.norm(mine, axis=-1) + np.linalg.norm(its, axis=-1)
        apart = np.linalg.norm(mine - its, axis=-1)
        return np.median(2 * apart / np.maximum(size, 1e-12), axis=-1)


def spread_ids(vocabulary: int) -> tuple[int, ...]:
    """Ids from all over a vocabulary."""
    return tuple((7919 * i + vocabulary * i // TOKENS + 11) % vocabulary for i in range(TOKENS))


@torch.no_grad()
def observe(model: PreTrainedModel, decoder: nn.Module, ids: tuple[int, ...]) -> Behaviour:
    """Run `ids` through the decoder, uncompiled, and project what its layers cache."""
    cache = DynamicCache()
    device = input_device(model)
    exact = torch.autocast(device.type, enabled=False)  # a model is the same under autocast
    with torch.compiler.set_stance("force_eager"), using_attention(model), exact:
        inputs = torch.tensor([ids], device=device)
        decoder(input_ids=inputs, past_key_values=cache, use_cache=True)
    layers = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
    return Behaviour(
        ids=tuple(ids),
        dtype=type_name(layers[0][0].dtype),
        projected=np.stack([np.stack([_projected(x) for x in pair]) for pair in layers]),
    )


def _projected(states: Tensor) -> np.ndarray:
    """`[Hkv, T, D]` -> `[T, PROJECTIONS]`."""
    flat = states.transpose(0, 1).flatten(1).float().cpu().numpy()
    return (flat @ noise(PROJECTIONS, flat.shape[1]).T / flat.shape[1] ** 0.5).astype(np.float32)
