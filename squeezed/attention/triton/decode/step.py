"""The launches of one decode step, in the order in which they run."""

from __future__ import annotations

import torch
import triton

from squeezed.attention.triton.decode import attention, coded, combine, descend
from squeezed.attention.triton.decode import open as lookup
from squeezed.attention.triton.decode.arguments import Arguments
from squeezed.attention.triton.decode.workspace import ceil_div, power_of_two


class Step(Arguments):
    """One decode step over one scratch; every method is one launch."""

    def open(self) -> None:
        cut, shape, s, tuning = self.cut, self.shape, self.scratch, self.tuning
        top = self.layer.levels[0] if self.layer.levels else None
        coding = self.coding
        programs = cut.pinned_chunks + cut.splits + cut.tile_batch * cut.recent_chunks
        programs += bool(coding.bits)
        lookup.open_kernel[cut.problems, programs](
            self._query(),
            self._context(),
            self._level(top),
            self._alpha(0),
            self._suffix(),
            self._mask(),
            (coding.key_turn, coding.turned, coding.units),
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
            CODE_BITS=coding.bits,
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
            self.coding.leaf_logits,
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
            CODED=bool(shape.code_bits),
            FAR=shape.far,
            DIPOLE=shape.dipole,
            **self._launch(tuning.warps[1], dependent=True, registers=tuning.registers),
        )

    def attend_lists(self) -> None:
        cut, shape, s, tuning, coding = (
            self.cut, self.shape, self.scratch, self.tuning, self.coding,
        )  # fmt: skip
        listed = (
            s.kept,
            tuple(level.mean_values for level in self.layer.levels),
            cut.bounds,
            s.far,
            s.counters,
            s.partials,
        )
        sizes = dict(
            **self._tile(),
            TILE=tuning.tile,
            NODE_TILE=tuning.node_tile,
            NODE_UNIT=tuning.node_unit,
            Z_PAD=power_of_two(cut.problems),
            SHARED=cut.tile_batch > 1,
            FAR=shape.far,
            DIPOLE=shape.dipole,
            STAGES=tuning.stages,
            **self._launch(tuning.warps[2], dependent=True, registers=tuning.attend_registers),
        )
        if coding.bits:
            coded.attend_coded_kernel[(cut.programs,)](
                (coding.turned, coding.units),
                (coding.keys, coding.values, coding.scales, shape.tokens - shape.pinned),
                coding.leaf_logits,
                *listed,
                coding.sums,
                s.moved,
                shape.batch,
                cut.problems,
                shape.pinned,
                R=cut.node_row_pad,
                PTX=shape.gpu.ptx,
                **coding.sizes(shape.dim),
                **sizes,
            )
            return
        attention.attend_kernel[(cut.programs,)](
            self._query(),
            self._context(),
            *listed,
            s.moved,
            shape.batch,
            cut.problems,
            self.scale_bits,
            M=cut.row_pad,
            **sizes,
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
            (self.coding.value_turn, self.coding.sums),
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
            CODED=bool(shape.code_bits),
            DIPOLE=shape.dipole,
            NODE_UNIT=tuning.node_unit,
            **self._launch(tuning.merge_warps, dependent=True),
        )
