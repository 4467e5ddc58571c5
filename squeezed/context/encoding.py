"""What the codes of encoded rows mean, how they are made, and the rotation they are taken in.

A clustered row is the mean of its leaf, which the index holds anyway, and a difference of few bits:

    key(r)   = mean_key[leaf]   + key_scale[r]   R' level(key_code[r])
    value(r) = mean_value[leaf] + value_scale[r] R' level(value_code[r])

`R` is orthonormal: random signs, then Walsh-Hadamard blocks of the largest power of two that
divides the dimension. It spreads what few dimensions hold over all of them, so that one scale and
even levels serve a row (rotations before quantising: QuaRot, arXiv 2404.00456). Nobody need turn
rows back: with `R q` a logit is `s q.mean_key + s scale (R q).level`, and an output is turned back
once, for `R'` is linear.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from squeezed.context.layers import ClusteredLayer
from squeezed.context.rows import PLAIN, Codes, Rows
from squeezed.errors import SqueezedError

SCALES = torch.bfloat16
"""Of a row's scale: as far as float32 reaches, and what its rounding adds is far below a level."""

SHARES = (0.55, 0.65, 0.75, 0.85, 1.0)
"""Where to look for the scale with the least error: shares of that which cuts nothing off."""

NUMBERS_AT_ONCE = 1 << 24
"""Numbers of rows that are encoded together."""

SEED = 0x5EED
"""Of the rotation's signs."""


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

    def width(self, dim: int) -> int:
        """Numbers of a row of codes."""
        return dim // 2 if self.packed else dim


ENCODINGS = {
    found.name: found
    for found in (
        Encoding("int8", -127, 127, 0.0, torch.int8, packed=False),
        Encoding("int4", 0, 15, 7.5, torch.uint8, packed=True),
    )
}
NAMES = (PLAIN, *ENCODINGS)
"""How rows may be written; `plain` is as the model made them."""


def check_encoding(name: str, dim: int | None = None) -> str:
    """`name`, if rows of `dim` numbers can be written so; raises `SqueezedError` otherwise."""
    if name not in NAMES:
        raise SqueezedError(f"rows: expected one of {', '.join(NAMES)}, got {name!r}")
    if dim is not None and name != PLAIN and ENCODINGS[name].packed and dim % 2:
        raise SqueezedError(
            f"rows: {name!r} needs an even head dimension, got {dim}; use 'int8' or {PLAIN!r}"
        )
    return name


def encoded(layer: ClusteredLayer, name: str) -> ClusteredLayer:
    """The layer with its clustered rows in an encoding; as it is without clusters or if `plain`.

    Raises:
        SqueezedError: rows that are encoded already, an unknown encoding, a dimension that it
            cannot pack, or keys too large for it.
    """
    check_encoding(name, layer.dim)
    keys, values = layer.rows.plain()
    if name == PLAIN or not layer.levels:
        return layer
    encoding, pinned, leaves = ENCODINGS[name], layer.pinned, layer.levels[-1]
    signs = random_signs(layer.dim).to(keys.device)
    of_keys = _coded(keys[:, pinned:], layer.of_leaves(leaves.centroids), encoding, signs)
    of_values = _coded(values[:, pinned:], layer.of_leaves(leaves.mean_values), encoding, signs)
    scales = torch.stack([of_keys[1], of_values[1]], -1)
    codes = Codes(of_keys[0], of_values[0], scales, signs)
    front = [x[:, :pinned].clone() for x in (keys, values)]
    return replace(layer, rows=Rows(front[0], front[1], name, codes))


def _coded(
    rows: Tensor, means: Iterator[Tensor], encoding: Encoding, signs: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes and scales of `rows [Hkv, n, D]`, given the mean of every row's leaf, head by head."""
    heads, count, dim = rows.shape
    codes = rows.new_empty(heads, count, encoding.width(dim), dtype=encoding.dtype)
    scales = rows.new_empty(heads, count, dtype=SCALES)
    at_once = max(1, NUMBERS_AT_ONCE // dim)
    for head, mean in enumerate(means):
        for first in range(0, count, at_once):
            own = slice(first, first + at_once)
            turned = turn(rows[head, own].float() - mean[own].float(), signs)
            found, scales[head, own] = quantised(turned, encoding)
            codes[head, own] = pack(found, encoding)
    if not bool(scales.isfinite().all()):
        raise SqueezedError(
            f"rows: {encoding.name!r} cannot hold keys or values this large; use {PLAIN!r}"
        )
    return codes, scales


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
    for front, code, scale, mean in (
        (rows.keys, codes.keys, codes.key_scales, leaves.centroids),
        (rows.values, codes.values, codes.value_scales, leaves.mean_values),
    ):
        turned = scale.to(dtype)[..., None] * levels(code, rows.encoding, dtype)
        means = torch.stack(list(layer.of_leaves(mean)))
        found.append(
            torch.cat([front.to(dtype), means.to(dtype) + turn_back(turned, codes.signs)], 1)
        )
    return found[0], found[1]


def turn(x: Tensor, signs: Tensor) -> Tensor:
    """`R x` of vectors `[..., D]`, in their type."""
    return _blocks(x * signs.to(x.dtype))


def turn_back(x: Tensor, signs: Tensor) -> Tensor:
    """`R' x`, which undoes `turn`."""
    return _blocks(x) * signs.to(x.dtype)


def block_of(dim: int) -> int:
    """Size of the rotation's blocks: the largest power of two that divides the dimension."""
    return dim & -dim


def _blocks(x: Tensor) -> Tensor:
    block = block_of(x.shape[-1])
    matrix = hadamard(block).to(x.device, x.dtype)
    return (x.unflatten(-1, (-1, block)) @ matrix).flatten(-2) * block**-0.5


@cache
def hadamard(size: int) -> Tensor:
    """`[size, size]` float64 of 1 and -1, entry `(i, j)` by the parity of the bits of `i & j`."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


@cache
def random_signs(dim: int) -> Tensor:
    """`[dim]` int8 of 1 and -1, the same everywhere and always.

    Drawn by xorshift, doi 10.18637/jss.v008.i14.
    """
    state, found = SEED, []
    for _ in range(dim):
        state ^= state << 13 & 0xFFFFFFFF
        state ^= state >> 17
        state ^= state << 5 & 0xFFFFFFFF
        found.append(1 if state & 1 else -1)
    return torch.tensor(found, dtype=torch.int8)
