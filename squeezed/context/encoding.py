"""What the codes of encoded rows mean, and how they are made.

A clustered row is the mean of its leaf, which the index holds anyway, and a difference of few bits:

    key(r)   = mean_key[leaf]   + key_scale[r]   key_turn level(key_code[r])
    value(r) = mean_value[leaf] + value_scale[r] level(value_code[r]) value_turn

Nobody need turn rows back: with `q' = q key_turn` a logit is `s q.mean_key + s key_scale q'.level`,
and the codes' part of an output is turned once, as a sum. Where the matrices come from says
`squeezed.context.turning`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from squeezed.config import check_rows
from squeezed.context.layers import ClusteredLayer
from squeezed.context.rows import PLAIN, Codes, Rows
from squeezed.context.turning import second_moment, turning
from squeezed.errors import SqueezedError

SCALES = torch.bfloat16
"""Of a row's scale: as far as float32 reaches, and what its rounding adds is far below a level."""

SHARES = (0.55, 0.65, 0.75, 0.85, 1.0)
"""Where to look for the scale with the least error: shares of that which cuts nothing off."""

NUMBERS_AT_ONCE = 1 << 24
"""Numbers of rows that are encoded together."""


@dataclass(frozen=True)
class Encoding:
    """Whole numbers from `low` to `high`, as codes; a code's level is what it is above `zero`.

    Attributes:
        packed: two codes to a byte: of dimension `i` below, of `i + D / 2` above.
    """

    name: str
    low: int
    high: int
    zero: float
    dtype: torch.dtype
    packed: bool

    @property
    def stored(self) -> tuple[int, int]:
        """Lowest and highest number in memory."""
        return (0, 255) if self.packed else (self.low, self.high)

    def width(self, dim: int) -> int:
        """Numbers of a row of codes."""
        return dim // 2 if self.packed else dim

    def row_bytes(self, dim: int) -> int:
        """Of a key with its value."""
        return 2 * (self.width(dim) * self.dtype.itemsize + SCALES.itemsize)


ENCODINGS = {
    found.name: found
    for found in (
        Encoding("int8", -127, 127, 0.0, torch.int8, packed=False),
        Encoding("int4", 0, 15, 7.5, torch.uint8, packed=True),
    )
}


def check_fits(name: str, dim: int) -> None:
    """Raise `SqueezedError` unless rows of `dim` numbers can be written so."""
    if check_rows(name) != PLAIN and ENCODINGS[name].packed and dim % 2:
        raise SqueezedError(
            f"rows: {name!r} needs an even head dimension, got {dim}; use 'int8' or {PLAIN!r}"
        )


def encoded(layer: ClusteredLayer, name: str, queries: Tensor | None = None) -> ClusteredLayer:
    """The layer with its clustered rows in an encoding; as it is without clusters or if `plain`.

    Args:
        queries: `[Hq, W, D]` of a probe, by which differences of keys are weighed; `None`: all of
            their directions alike.

    Raises:
        SqueezedError: rows that are encoded already, an unknown encoding, a dimension that it
            cannot pack, or keys too large for it.
    """
    check_fits(name, layer.dim)
    rows, leaves = layer.rows.plain(), layer.levels[-1] if layer.levels else None
    if name == PLAIN or leaves is None:
        return layer
    grouped = None if queries is None else queries.unflatten(0, (layer.kv_heads, -1)).flatten(1, 2)
    found = [
        coded(Differences(layer, own, means), ENCODINGS[name], seen)
        for own, means, seen in zip(
            rows, (leaves.centroids, leaves.mean_values), (grouped, None), strict=True
        )
    ]
    (keys, key_scales, key_turn), (values, value_scales, value_turn) = found
    codes = Codes(
        keys,
        values,
        torch.stack([key_scales, value_scales], -1),
        key_turn.mT.contiguous(),
        value_turn,
    )
    front = [own[:, : layer.pinned].clone() for own in rows]
    return replace(layer, rows=Rows(front[0], front[1], name, codes))


@dataclass(frozen=True)
class Differences:
    """Of the clustered rows among `rows [Hkv, P, D]` from the means `[Hkv, C, D]` of their leaves,
    some of a head at a time, float32 `[m, D]`."""

    layer: ClusteredLayer
    rows: Tensor
    means: Tensor

    def of_head(self, head: int) -> Iterator[tuple[slice, Tensor]]:
        layer, at_once = self.layer, max(1, NUMBERS_AT_ONCE // self.layer.dim)
        mean = self.means[head].float()
        own = torch.arange(len(mean), device=mean.device).repeat_interleave(
            layer.levels[-1].sizes[head], output_size=layer.clustered
        )
        for first in range(0, layer.clustered, at_once):
            some = slice(first, first + at_once)
            yield some, self.rows[head, layer.pinned :][some].float() - mean[own[some]]

    def moments(self) -> Tensor:
        """Second moment of each head's, up to a factor, float64 `[Hkv, D, D]`."""
        heads = range(self.layer.kv_heads)
        return torch.stack([second_moment(x for _, x in self.of_head(head)) for head in heads])


def coded(
    differences: Differences, encoding: Encoding, queries: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales `[Hkv, n]` and what turns levels into differences, `[Hkv, D, D]`."""
    layer = differences.layer
    matrix = turning(differences.moments(), queries).to(layer.dtype)
    inverse = torch.linalg.inv(matrix.double()).float()
    shape = layer.kv_heads, layer.clustered
    codes = matrix.new_empty(*shape, encoding.width(layer.dim), dtype=encoding.dtype)
    scales = matrix.new_empty(shape, dtype=SCALES)
    for head in range(layer.kv_heads):
        for own, away in differences.of_head(head):
            found, scales[head, own] = quantised(away @ inverse[head], encoding)
            codes[head, own] = pack(found, encoding)
    if not bool(scales.isfinite().all()):
        raise SqueezedError(
            f"rows: {encoding.name!r} cannot hold keys or values this large; use {PLAIN!r}"
        )
    return codes, scales, matrix


def quantised(rows: Tensor, encoding: Encoding) -> tuple[Tensor, Tensor]:
    """Codes `[n, D]` of float32 rows, not packed, and scales `[n]`, with the least squared error
    that some cuts and the best scale for each of them give."""
    largest = rows.abs().amax(-1, keepdim=True)
    largest = torch.where(largest == 0, 1.0, largest)
    rows = rows / largest  # whose squares neither overflow nor vanish
    best = torch.full_like(largest, torch.inf)
    codes, scales = torch.zeros_like(rows), largest.to(SCALES)
    for share in SHARES:
        level = _nearest(rows, share / (encoding.high - encoding.zero), encoding) - encoding.zero
        fit = (rows * level).sum(-1, keepdim=True) / level.square().sum(-1, keepdim=True)
        fit = fit.nan_to_num(0.0)  # of levels that are all 0
        rounded = (fit * largest).to(SCALES)
        scale = rounded.float() / largest
        found = _nearest(rows, scale, encoding)
        error = (rows - scale * (found - encoding.zero)).square().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        codes, scales = torch.where(better, found, codes), torch.where(better, rounded, scales)
    return codes, scales[:, 0]


def _nearest(rows: Tensor, scale: Tensor | float, encoding: Encoding) -> Tensor:
    levels = torch.nan_to_num(rows / scale, 0.0)  # of a scale that is 0
    return (levels + encoding.zero).round().clamp(encoding.low, encoding.high)


def pack(codes: Tensor, encoding: Encoding) -> Tensor:
    """Codes `[..., D]` as they are stored."""
    codes = codes.to(encoding.dtype)
    if not encoding.packed:
        return codes
    low, high = codes.chunk(2, -1)
    return low | high << 4


def levels(codes: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """Levels `[..., D]` of stored codes."""
    encoding = ENCODINGS[name]
    if encoding.packed:
        codes = torch.cat([codes & 15, codes >> 4], -1)
    return codes.to(dtype) - encoding.zero


def wide(layer: ClusteredLayer, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values `[Hkv, P, D]` as numbers of that type, decoded if they are encoded: for
    formulas, for no kernel makes such copies.

    Raises:
        SqueezedError: an encoding that nobody knows.
    """
    rows, codes = layer.rows, layer.rows.codes
    if codes is None:
        return rows.wide(dtype)
    leaves, found = layer.levels[-1], []
    for front, code, scale, matrix, mean in (
        (rows.keys, codes.keys, codes.key_scales, codes.key_turn.mT, leaves.centroids),
        (rows.values, codes.values, codes.value_scales, codes.value_turn, leaves.mean_values),
    ):
        away = scale.to(dtype)[..., None] * (levels(code, rows.encoding, dtype) @ matrix.to(dtype))
        means = torch.stack(list(layer.of_leaves(mean))).to(dtype)
        found.append(torch.cat([front.to(dtype), means + away], 1))
    return found[0], found[1]
