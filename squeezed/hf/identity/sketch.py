"""Random projections of a weight: a few numbers that any edit moves, and rounding hardly.

Rows fall into buckets at random; a bucket holds the sum of its rows' products with a random vector.
An edit of one row moves its bucket by about the edit's own norm, whatever else the matrix holds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Products = Callable[[Tensor], Tensor]
"""`[K, C]` directions -> `[R, K]`, what an adapter adds to a weight's products."""

PROJECTIONS, BUCKETS = 2, 8
ROUNDINGS = {
    torch.float64: (torch.bfloat16, torch.float16),
    torch.float32: (torch.bfloat16, torch.float16),
    torch.bfloat16: (torch.float16,),
    torch.float16: (torch.bfloat16,),
}
"""What else a weight is sketched as: the types that the same checkpoint may be loaded in."""

IN_PLACE_OF_NAN_AND_INFINITIES = 47.93, 61.37, -53.21
"""Numbers that no weight has, of a size beside which an edit of the others shows."""

BASE = "base"

SUMMED = 1e-5
"""Error of sums in float32, in another order, over the norm of what is summed."""

ROUNDED = 6 * 2**-7 / 12**0.5
"""Six standard deviations of a rounding to bfloat16, over the norm of what is rounded."""


@dataclass(frozen=True)
class Sketch:
    """Projections of one weight.

    Attributes:
        dtype: name of the weight's type, such as `bfloat16`.
        buckets: `[PROJECTIONS, buckets]` float32; one bucket for a vector.
        rounded: by type name, `[PROJECTIONS]` sums over the buckets of the weight rounded to it;
            for a weight that adapters add to instead under `BASE`, those of the weight alone.
        norm: the weight's norm, estimated.
    """

    dtype: str
    buckets: np.ndarray
    rounded: dict[str, np.ndarray]
    norm: float

    @property
    def total(self) -> np.ndarray:
        """`[PROJECTIONS]`, sums over the buckets."""
        return self.buckets.sum(1, dtype=np.float64)

    def equals(self, other: Sketch) -> bool:
        """Whether both are one weight in one type."""
        return self.dtype == other.dtype and _near(self.buckets, other.buckets, self._error(other))

    def rounds_to(self, other: Sketch) -> bool:
        """Whether both are one weight after rounding to one of the types they are known in."""
        mine, its = ({s.dtype: s.total, **s.rounded} for s in (self, other))
        shared = mine.keys() & its.keys() - {BASE}
        if any(_near(mine[name], its[name], self._error(other)) for name in shared):
            return True
        # a float32 checkpoint loaded once as one and once as the other: neither knows the original
        return {self.dtype, other.dtype} == {"bfloat16", "float16"} and self.is_near(other)

    def adds_to(self, other: Sketch) -> bool:
        """Whether this is `other` with what adapters add to it."""
        alone, its = self.rounded.get(BASE), {other.dtype: other.total, **other.rounded}
        return (
            alone is not None
            and self.dtype in its
            and _near(alone, its[self.dtype], self._error(other))
        )

    def _error(self, other: Sketch) -> float:
        return float(SUMMED * np.maximum(self.norm, other.norm))  # NaN if one of them is

    def is_near(self, other: Sketch, slack: float = 1) -> bool:
        """Whether both are one weight but for the rounding of every element to 16 bits."""
        tolerance = (
            1.5 * slack * ROUNDED * self._error(other) / SUMMED / self.buckets.shape[1] ** 0.5
        )
        return _near(self.buckets, other.buckets, tolerance)


def _near(one: np.ndarray, other: np.ndarray, tolerance: float) -> bool:
    """Whether all are equal to `tolerance`; where sums passed float32, in every bit."""
    tolerance = tolerance if np.isfinite(tolerance) else 0.0
    return one.shape == other.shape and bool(
        np.allclose(one, other, rtol=0, atol=tolerance, equal_nan=True)
    )


def sketch(
    weight: Tensor,
    roundings: Sequence[torch.dtype] = (),
    logarithm: bool = False,
    change: Products | None = None,
) -> Sketch:
    """Sketch a weight of any shape and real type, on its own device.

    Args:
        roundings: types that it is sketched as besides its own.
        logarithm: sketch the logarithms of its absolute values: frequencies span decades.
        change: what is added to the weight `[R, C]`.
    """
    flat = weight.detach().reshape(weight.shape[0] if weight.dim() else 1, -1)
    directions = torch.from_numpy(noise(PROJECTIONS, flat.shape[1])).to(flat.device)
    products: list[list[Tensor]] = [[] for _ in range(1 + len(roundings))]
    rows = max(1, (1 << (17 if flat.device.type == "cpu" else 25)) // max(1, flat.shape[1]))
    for start in range(0, flat.shape[0], rows):
        part = flat[start : start + rows]
        for found, dtype in zip(products, (part.dtype, *roundings), strict=True):
            numbers = part.to(dtype).float()
            if logarithm:
                numbers = numbers.abs().clamp_min(1e-30).log()
            found.append(_finite_times(numbers, directions))
    own, *others = (torch.cat(found).cpu().double().numpy() for found in products)
    rounded = dict(zip(map(type_name, roundings), others, strict=True))
    if change is not None:
        rounded = {BASE: own}
        own = own + change(directions).detach().cpu().double().numpy()
    return Sketch(
        dtype=type_name(weight.dtype),
        buckets=_bucketed(own, BUCKETS if weight.dim() > 1 else 1).astype(np.float32),
        rounded={n: _bucketed(x, 1)[:, 0].astype(np.float32) for n, x in rounded.items()},
        norm=float(np.sqrt(np.square(own).sum() / PROJECTIONS)),
    )


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _finite_times(numbers: Tensor, directions: Tensor) -> Tensor:
    """The same where numbers are not finite, which would drown all others in a sum."""
    found = _times(numbers, directions)
    if bool(found.isfinite().all()):
        return found
    return _times(torch.nan_to_num(numbers, *IN_PLACE_OF_NAN_AND_INFINITIES), directions)


def _times(numbers: Tensor, directions: Tensor) -> Tensor:
    """`[R, C]` times `[K, C]` -> `[R, K]`, in float32 whatever precision PyTorch is set to."""
    if numbers.device.type == "cpu":
        with np.errstate(invalid="ignore", over="ignore"):  # infinite weights are seen to later
            columns = [torch.from_numpy(numbers.numpy() @ column.numpy()) for column in directions]
    else:
        columns = [(numbers * column).sum(1) for column in directions]
    return torch.stack(columns, 1)


def _bucketed(products: np.ndarray, buckets: int) -> np.ndarray:
    """`[R, PROJECTIONS]` -> `[PROJECTIONS, buckets]`, rows weighted and dealt at random."""
    bucket = _hashed(len(products), 1) % buckets
    weighted = products * noise(1, len(products)).T
    return np.stack([np.bincount(bucket, column, buckets) for column in weighted.T])


@functools.lru_cache(maxsize=64)
def noise(rows: int, length: int) -> np.ndarray:
    """`[rows, length]` float32 of variance 1, none of them near 0, always the same."""
    drawn = np.stack([_hashed(length, 2 + row) for row in range(rows)])
    size = 0.6 + 0.75 * ((drawn >> 8) & 0xFFFF) / 65536  # mean square .993
    return np.where(drawn & 1, size, -size).astype(np.float32)


def _hashed(length: int, salt: int) -> np.ndarray:
    """The numbers below `length`, mixed by splitmix64 (https://prng.di.unimi.it/splitmix64.c)."""
    mixed = np.arange(1, length + 1, dtype=np.uint64) + np.uint64(salt << 40)
    mixed *= np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(2)).astype(np.int64)
