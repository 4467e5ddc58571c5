"""Encoded rows of a decode step: their codes as kernels take them, and the scratch they need."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from squeezed.attention.triton.decode.workspace import Plan, Shape, power_of_two
from squeezed.attention.triton.rows import code_bits, views
from squeezed.context.rows import Rows


@dataclass(frozen=True)
class Coding:
    """What a step over encoded rows has besides; any tensors where rows are plain.

    Attributes:
        bits: of a code; 0 of plain rows.
        keys, values, scales: codes `[Hkv, n, D * bits / 8]` int8 or uint8, `[Hkv, n, D * bits /
            16]` int16, and `[Hkv, n]` int32: a key's bfloat16 scale below its value's.
        key_turn, value_turn: `[Hkv, D, D]`, by which queries and outputs are turned.
        turned, units: `[Z, 2 * R, D]` int8 and `[Z, 2, R]`, turned queries and what they are worth.
        leaf_logits: `[Z, C, R]`, logits of the kept leaves' mean keys, in bits.
        sums: `[slots, rows, D]`, turned sums of the kept rows.
    """

    bits: int
    keys: Tensor
    values: Tensor
    scales: Tensor
    key_turn: Tensor
    value_turn: Tensor
    turned: Tensor
    units: Tensor
    leaf_logits: Tensor
    sums: Tensor

    @staticmethod
    def of(rows: Rows, shape: Shape, cut: Plan) -> Coding:
        keys, codes = rows.keys, rows.codes
        if codes is None:
            return Coding(0, *[keys] * 9)

        def new(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(size, dtype=dtype, device=keys.device)

        problems, padded = cut.problems, cut.node_row_pad
        return Coding(
            code_bits(rows),
            *views(codes),
            codes.key_turn,
            codes.value_turn,
            turned=new(problems, 2 * padded, shape.dim, dtype=torch.int8),
            units=new(problems, 2, padded),
            leaf_logits=new(problems, shape.nodes[-1], padded),
            sums=new(cut.fixed_base, cut.rows, shape.dim),
        )

    def sizes(self, dim: int) -> dict[str, int]:
        """Compile-time sizes of codes; products of matrices need so many at least."""
        key_width, value_width = dim * self.bits // 8, dim * self.bits // 16
        return dict(
            BITS=self.bits,
            K_PAD=max(32, power_of_two(key_width)),
            V_PAD=max(16, power_of_two(value_width)),
        )
