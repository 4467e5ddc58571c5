"""The launches of one decode step, in the order in which they run."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from squeezed.attention.interface import Suffix
from squeezed.attention.triton.decode import attention, combine, descend
from squeezed.attention.triton.decode import open as lookup
from squeezed.attention.triton.decode.workspace import (
    Shape,
    Tuning,
    Workspace,
    ceil_div,
    plan,
    power_of_two,
)
from squeezed.context.layers import ClusteredLayer, Level
from squeezed.context.rule import SelectionRule


class Step:
    """One decode step over one scratch; every method is one launch."""

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

    # Tuples of arguments, by the names that they have in the kernels.

    def _query(self) -> tuple[Tensor, int, int]:
        return self.query, self.query.stride(0), self.query.stride(1)

    def _context(self) -> tuple[Tensor, Tensor, int]:
        return *self.layer.rows.plain(), self.shape.tokens

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

    def open(self) -> None:
        cut, shape, s, tuning = self.cut, self.shape, self.scratch, self.tuning
        top = self.layer.levels[0] if self.layer.levels else None
        programs = cut.pinned_chunks + cut.splits + cut.tile_batch * cut.recent_chunks
        lookup.open_kernel[cut.problems, programs](
            self._query(),
            self._context(),
            self._level(top),
            self._alpha(0),
            self._suffix(),
            self._mask(),
            s.scores,
            s.parents_of,
            self._norms(),
            s.partials,
            s.counters,
            s.read_counts,
            self.keys_read,
            shape.batch,
            shape.pinned,
            shape.recent,
            s.parents_of.shape[1],
            (cut.pinned_chunks, cut.recent_chunks),
            cut.fixed_base,
            self.scale_bits,
            **self._tile(),
            M=cut.row_pad,
            M_ONE=16,
            R=cut.node_row_pad,
            N=tuning.score_tile,
            CHUNK=tuning.chunk,
            SECOND=bool(top) and self.rule.alpha is not None,
            NESTED=cut.nested,
            MASKED=self.suffix is not None and self.suffix.mask is not None,
            **self._launch(tuning.warps[0], dependent=False, stages=2),
        )

    def descend(self, stage: int) -> None:
        cut, shape, s, tuning, rule = self.cut, self.shape, self.scratch, self.tuning, self.rule
        levels, flat = self.layer.levels, not cut.nested
        above, own = (0, 0) if flat else (stage, stage + 1)
        parent, child = levels[above], levels[own]
        leaves = child.child_offsets is None
        norm_pad = power_of_two(cut.splits)
        listers = cut.listers if stage == 0 else 0
        descend.descend_kernel[cut.problems, cut.parts[stage] + listers](
            self._query(),
            (parent.variance, parent.key_offsets, parent.nodes, cut.bounds[above]),
            (*self._level(child), cut.bounds[own]),
            (self._alpha(above), self._alpha(own), rule.far_alpha if shape.dipole else self.query),
            (rule.log_thresholds[above], rule.log_thresholds[own]),
            s.scores,
            s.parents_of,
            s.states[max(stage - 1, 0)],
            s.states[0 if leaves else stage],
            0 if leaves else levels[own + 1].nodes,
            self._norms(),
            s.kept,
            s.far,
            s.counters,
            s.read_counts,
            self._valid(),
            shape.batch,
            listers,
            self.scale_bits,
            TOP=stage == 0,
            FLAT=flat,
            LEAVES=leaves,
            **self._tile(),
            R=cut.node_row_pad,
            N=tuning.nodes,
            WRITE=tuning.write,
            NORM_PAD=norm_pad,
            ROWS_PAD=power_of_two(cut.rows),
            NORM_STEP=min(norm_pad, max(16, 2048 // power_of_two(cut.rows))),
            REQUESTS=power_of_two(cut.tile_batch),
            BITS=triton.language.int32 if cut.bits == torch.int32 else triton.language.int64,
            EVERYONE=cut.everyone,
            SHARED=cut.tile_batch > 1,
            SECOND=rule.alpha is not None,
            PADDED=self.valid is not None,
            FAR=shape.far,
            DIPOLE=shape.dipole,
            **self._launch(tuning.warps[1], dependent=True, registers=tuning.registers),
        )

    def attend_lists(self) -> None:
        cut, shape, s, tuning = self.cut, self.shape, self.scratch, self.tuning
        attention.attend_kernel[(cut.programs,)](
            self._query(),
            self._context(),
            s.kept,
            tuple(level.mean_values for level in self.layer.levels),
            cut.bounds,
            s.far,
            s.counters,
            s.partials,
            s.moved,
            shape.batch,
            cut.problems,
            self.scale_bits,
            **self._tile(),
            M=cut.row_pad,
            TILE=tuning.tile,
            NODE_TILE=tuning.node_tile,
            NODE_UNIT=tuning.node_unit,
            Z_PAD=power_of_two(cut.problems),
            SHARED=cut.tile_batch > 1,
            FAR=shape.far,
            DIPOLE=shape.dipole,
            STAGES=tuning.stages,
            **self._launch(tuning.warps[2], dependent=True),
        )

    def combine(self) -> None:
        cut, shape, s, tuning = self.cut, self.shape, self.scratch, self.tuning
        dims = min(tuning.merge_dims, power_of_two(shape.dim))
        combine.combine_kernel[cut.problems, cut.rows, ceil_div(shape.dim, dims)](
            self._query(),
            self.layer.value_slope,
            (self.output, self.output.stride(0)),
            self.log_mass,
            self.keys_read,
            self._valid(),
            s.counters,
            s.read_counts,
            s.partials,
            s.moved,
            shape.batch,
            cut.problems,
            cut.programs,
            (cut.fixed_base, cut.fixed_slots),
            self.scale_bits,
            **self._tile(),
            DIMS=dims,
            Z_PAD=power_of_two(cut.problems),
            SLOTS=tuning.merge_slots,
            CLUSTERED=bool(shape.nodes),
            PADDED=self.valid is not None,
            DIPOLE=shape.dipole,
            NODE_UNIT=tuning.node_unit,
            **self._launch(tuning.merge_warps, dependent=True),
        )
