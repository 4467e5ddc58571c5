"""Fixed contexts of random layers, and one call of a method on them."""

from dataclasses import dataclass

import torch
from trees import random_layer

from squeezed.attention.interface import Suffix
from squeezed.config import BEST, PAPER
from squeezed.context.captured import ObservedLayer
from squeezed.indexing.calibrate import calibrate
from squeezed.indexing.forest import Forest

SCALE = 0.3
KV_HEADS, GROUP, DIM, PINNED = 2, 2, 32, 20
BUDGETS = (0.05, 0.1, 0.3)


@dataclass
class RandomContext:
    """What methods need of a `FixedContext`."""

    clustered_layers: list
    observed: list
    calibrations: dict

    def calibration(self, preset):
        return self.calibrations[preset]


def random_context(layers=2, tokens=300, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    trees = [
        random_layer(KV_HEADS, tokens, DIM, pinned=PINNED, seed=seed + i, dtype=dtype, scale=SCALE)
        for i in range(layers)
    ]
    queries = [torch.randn(KV_HEADS * GROUP, 12, DIM, generator=generator).to(dtype) for _ in trees]
    seen = Forest.of([ObservedLayer(*pair) for pair in zip(trees, queries, strict=True)])
    calibrations = {preset.name: calibrate(seen, preset, BUDGETS) for preset in (PAPER, BEST)}
    return RandomContext(trees, queries, calibrations)


@dataclass
class Call:
    """One batch of queries with its suffix."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor | None = None

    def attend(self, layer, per_token=True):
        suffix, valid = Suffix(self.keys, self.values, self.mask), None
        if self.mask is not None:
            valid = self.mask.any(-1)[:, 0].expand(len(self.query), -1)
        return layer.attend(self.query, suffix, valid, per_token)

    def of(self, request):
        mask = None if self.mask is None else self.mask[request : request + 1]
        one = slice(request, request + 1)
        return Call(self.query[one], self.keys[one], self.values[one], mask)


def random_call(batch=2, rows=3, suffix=5, seed=7, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, KV_HEADS, suffix, DIM)
    return Call(
        torch.randn(batch, KV_HEADS * GROUP, rows, DIM, generator=generator).to(dtype),
        torch.randn(shape, generator=generator).to(dtype),
        torch.randn(shape, generator=generator).to(dtype),
    )
