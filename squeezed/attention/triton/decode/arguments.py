"""The arguments of the launches of one decode step, by the names that they have in the kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from squeezed.attention.interface import Suffix
from squeezed.attention.triton.decode.coding import Coding
from squeezed.attention.triton.decode.workspace import Shape, Tuning, Workspace, plan, power_of_two
from squeezed.attention.triton.rows import in_16_bits
from squeezed.context.layers import ClusteredLayer, Level
from squeezed.context.rule import SelectionRule


class Arguments:
    """What the launches of one decode step over one scratch are given."""

    def __init__(
        self,
        query: Tensor,
        layer: ClusteredLayer,
        rule: SelectionRule,
        suffix: Suffix | None,
        valid: Tensor | None,
        shape: Shape,
        tuning: Tuning,
    ) -> None:
        self.query, self.layer, self.rule, self.tuning = query, layer, rule, tuning
        self.suffix, self.valid = suffix, valid
        self.shape, self.cut = shape, plan(shape, tuning)
        self.scale_bits = layer.scale * math.log2(math.e)
        self.scratch = Workspace.allocate(shape, self.cut, query.device)
        self.coding = Coding.of(layer.rows, shape, self.cut)
        self.output = torch.empty_like(query, memory_format=torch.contiguous_format)
        self.log_mass = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        self.keys_read = torch.empty(shape.batch, dtype=torch.int64, device=query.device)

    def _tile(self) -> dict:
        """Compile-time sizes that every kernel shares."""
        cut, dim = self.cut, self.shape.dim
        return dict(
            GROUP=cut.group,
            TILE_BATCH=cut.tile_batch,
            TILES=cut.tiles,
            ROWS=cut.rows,
            D=dim,
            D_PAD=power_of_two(dim),
        )

    def _launch(
        self, warps: int, dependent: bool, stages: int = 1, registers: int | None = None
    ) -> dict:
        """Launch options; a dependent kernel may start while its predecessor drains."""
        overlap = self.tuning.overlap
        options = dict(num_warps=warps, num_stages=stages, PDL=overlap)
        if self.shape.gpu.generation and registers:
            options["maxnreg"] = registers
        return options | dict(launch_pdl=True) if overlap and dependent else options

    def _alpha(self, level: int) -> Tensor:
        return self.query if self.rule.alpha is None else self.rule.alpha[level]

    def _query(self) -> tuple[Tensor, int, int]:
        return self.query, self.query.stride(0), self.query.stride(1)

    def _context(self) -> tuple[Tensor, Tensor, int]:
        keys, values = in_16_bits(self.layer.rows)
        return keys, values, keys.shape[1]

    def _level(self, level: Level | None) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        if level is None:  # any tensors: the kernel reads none
            return self.query, self.query, self.query, self.query, 0
        children = level.key_offsets if level.child_offsets is None else level.child_offsets
        return level.centroids, level.variance, level.key_offsets, children, level.nodes

    def _suffix(self) -> tuple[Tensor, Tensor, int, int, int]:
        own = self.suffix
        keys, values = (self.query, self.query) if own is None else (own.keys, own.values)
        return keys, values, keys.stride(0), keys.stride(1), keys.stride(2)

    def _mask(self) -> tuple[Tensor, int, int]:
        mask = None if self.suffix is None else self.suffix.mask
        return (self.query, 0, 0) if mask is None else (mask, mask.stride(0), mask.stride(3))

    def _norms(self) -> tuple[Tensor, Tensor, int]:
        return self.scratch.norm_peaks, self.scratch.norm_masses, self.cut.splits

    def _valid(self) -> tuple[Tensor, int]:
        """Which requests are no padding, and the stride between them."""
        return (self.query, 0) if self.valid is None else (self.valid, self.valid.stride(0))
