"""The launches of one decode step, in the order in which they run."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from squeezed.config import SELF_CALIBRATION_CLAMP
from squeezed.ops.triton import attention, descend, lookup, select
from squeezed.ops.triton.workspace import (
    Shape,
    Tuning,
    Workspace,
    ceil_div,
    plan,
    power_of_two,
)


class Step:
    """One decode step over one scratch; every method is one launch."""

    def __init__(self, query, layer, rule, keys, values, mask, scale, shape: Shape, tuning: Tuning):
        self.query, self.layer, self.rule, self.tuning = query, layer, rule, tuning
        self.suffix_keys, self.suffix_values, self.mask = keys, values, mask
        self.shape, self.cut = shape, plan(shape, tuning)
        self.scale_bits = scale * math.log2(math.e)
        self.scratch = Workspace.allocate(shape, self.cut, query.device)
        self.output = torch.empty_like(query, memory_format=torch.contiguous_format)
        self.keys_read = torch.empty(shape.batch, dtype=torch.int64, device=query.device)

    def _tile(self) -> dict:
        """Compile-time sizes that every kernel shares."""
        cut, dim = self.cut, self.shape.dim
        return dict(
            GROUP=cut.group, TILE_BATCH=cut.tile_batch, TILES=cut.tiles, ROWS=cut.rows,
            D=dim, D_PAD=power_of_two(dim),
        )  # fmt: skip

    def _launch(self, warps: int, dependent: bool, stages: int = 1) -> dict:
        """Launch options; a dependent kernel may start while its predecessor drains."""
        overlap = self.tuning.overlap
        options = dict(num_warps=warps, num_stages=stages, PDL=overlap)
        return options | dict(launch_pdl=True) if overlap and dependent else options

    def _energy(self, level: int) -> Tensor:
        return self.query if self.rule.alpha is None else self.rule.alpha[level]

    def open(self) -> None:
        cut, shape, s, tuning = self.cut, self.shape, self.scratch, self.tuning
        keys, values, mask = self.suffix_keys, self.suffix_values, self.mask
        top = self.layer.levels[0] if self.layer.levels else None
        fine = self.layer.levels[1] if cut.fine_splits else top
        recent_programs = cut.tile_batch * cut.recent_chunks
        shared_programs = cut.pinned_chunks + cut.splits + cut.fine_splits
        lookup.open_kernel[cut.problems, shared_programs + recent_programs](
            self.query, self.layer.keys, self.layer.values,
            top.centroids if top else self.query, top.variance if top else self.query,
            top.key_offsets if top else self.query, self._energy(0),
            fine.centroids if fine else self.query, fine.variance if fine else self.query,
            fine.key_offsets if fine else self.query, s.fine_logits,
            top.child_offsets if cut.fine_splits else s.owner, s.owner, keys, values,
            self.query if mask is None else mask, s.logits, s.norm_highs, s.norm_masses,
            s.sums, s.highs, s.masses, s.counters, s.read_counts, self.keys_read,
            self.query.stride(0), self.query.stride(1), keys.stride(0), keys.stride(1),
            keys.stride(2), 0 if mask is None else mask.stride(0),
            0 if mask is None else mask.stride(3),
            shape.batch, shape.tokens, shape.pinned, shape.recent, top.nodes if top else 0,
            cut.splits, fine.nodes if fine else 0, cut.fine_splits,
            cut.pinned_chunks, cut.recent_chunks, cut.fixed_base, self.scale_bits,
            **self._tile(), M=cut.row_pad, M_ONE=16, N=tuning.score_tile, CHUNK=tuning.chunk,
            COUNTERS=s.counters.shape[1], SCORED=cut.fine_splits > 0,
            SECOND=bool(top) and self.rule.alpha is not None,
            MASKED=mask is not None, **self._launch(tuning.warps[0], dependent=False, stages=2),
        )  # fmt: skip

    def select(self) -> None:
        cut, shape, s, tuning, rule = self.cut, self.shape, self.scratch, self.tuning, self.rule
        parent, child = self.layer.levels[:2]
        leaves = len(self.layer.levels) == 2
        found = 0 if leaves else 1
        threshold = [t * math.log2(math.e) for t in rule.log_thresholds]
        select.select_kernel[cut.problems, cut.parts[0]](
            self.query, self._energy(0), self._energy(1), s.logits, s.fine_logits, s.owner,
            parent.key_offsets, parent.variance, parent.mean_values, child.key_offsets,
            child.variance, child.mean_values, s.norm_highs, s.norm_masses,
            s.kept[found], s.kept_bits[found], s.counters, s.read_counts, s.sums, s.highs,
            s.masses, s.estimate_highs, s.estimate_masses,
            self.query.stride(0), self.query.stride(1), shape.batch, parent.nodes, child.nodes,
            ceil_div(child.nodes, tuning.select), s.kept[found].shape[1], cut.splits,
            cut.fixed_base + cut.pinned_chunks, cut.fixed_slots, cut.recent_chunks,
            cut.far_base, sum(cut.parts), threshold[0], threshold[1], self.scale_bits,
            FOUND=found, LEAVES=leaves, N=tuning.select, **self._selection(tuning.warps[1]),
        )  # fmt: skip

    def _selection(self, warps: int) -> dict:
        """Compile-time sizes that both selection kernels share."""
        cut, shape, tuning, rule = self.cut, self.shape, self.tuning, self.rule
        return self._tile() | dict(
            COUNTERS=self.scratch.counters.shape[1], M=cut.row_pad, WRITE=tuning.write,
            NORM_PAD=power_of_two(cut.splits), RECENT_PAD=power_of_two(max(cut.recent_chunks, 1)),
            BITS=triton.language.int32 if cut.bits == torch.int32 else triton.language.int64,
            SHARED=cut.tile_batch > 1, SECOND=rule.alpha is not None,
            MASKED=self.mask is not None or shape.recent == 0, FAR=shape.far,
            CALIBRATED=rule.far_field == "self_calibrated", **self._launch(warps, dependent=True),
        )  # fmt: skip

    def descend(self, stage: int) -> None:
        cut, shape, s, tuning, rule = self.cut, self.shape, self.scratch, self.tuning, self.rule
        levels = self.layer.levels
        flat = len(levels) == 1
        parent, child = levels[stage], levels[stage if flat else stage + 1]
        leaves = flat or stage + 2 == len(levels)
        listed, found = stage, 0 if leaves else stage + 1
        threshold = [t * math.log2(math.e) for t in rule.log_thresholds]
        descend.descend_kernel[cut.problems, cut.parts[stage]](
            self.query, self._energy(stage), self._energy(stage if flat else stage + 1),
            s.logits, parent.key_offsets, parent.variance, parent.mean_values,
            parent.key_offsets if flat else parent.child_offsets, child.centroids,
            child.key_offsets, child.variance, child.mean_values, s.norm_highs, s.norm_masses,
            s.kept[listed], s.kept_bits[listed], s.kept[found], s.kept_bits[found],
            s.counters, s.read_counts, s.sums, s.highs, s.masses,
            s.estimate_highs, s.estimate_masses,
            self.query.stride(0), self.query.stride(1), shape.batch, parent.nodes, child.nodes,
            s.kept[listed].shape[1], s.kept[found].shape[1], cut.splits,
            cut.fixed_base + cut.pinned_chunks, cut.fixed_slots, cut.recent_chunks,
            cut.far_base + sum(cut.parts[:stage]), sum(cut.parts),
            threshold[stage], threshold[stage if flat else stage + 1], self.scale_bits,
            LISTED=listed, FOUND=found, TOP=stage == 0, FLAT=flat, LEAVES=leaves,
            N_PARENT=tuning.parents, N=tuning.children, maxnreg=tuning.select_registers,
            **self._selection(tuning.warps[1]),
        )  # fmt: skip

    def attend(self) -> None:
        cut, shape, s, tuning = self.cut, self.shape, self.scratch, self.tuning
        attention.attend_kernel[(cut.programs,)](
            self.query, self.layer.keys, self.layer.values, s.kept[0], s.kept_bits[0], s.counters,
            s.sums, s.highs, s.masses, self.query.stride(0), self.query.stride(1),
            shape.batch, cut.problems, shape.tokens, s.kept[0].shape[1], s.counters.shape[1],
            self.scale_bits, **self._tile(), M=cut.row_pad, TILE=tuning.tile,
            Z_PAD=power_of_two(cut.problems), SHARED=cut.tile_batch > 1, STAGES=tuning.stages,
            **self._launch(tuning.warps[2], dependent=True),
        )  # fmt: skip

    def combine(self) -> None:
        cut, shape, s = self.cut, self.shape, self.scratch
        attention.combine_kernel[cut.problems, cut.rows](
            self.output, self.keys_read, s.counters, s.read_counts, s.sums, s.highs, s.masses,
            s.estimate_highs, s.estimate_masses, self.output.stride(0), shape.batch, cut.problems,
            s.counters.shape[1], cut.programs, cut.fixed_base, cut.fixed_slots, cut.far_base,
            sum(cut.parts) if shape.far else 0, s.estimate_highs.shape[1],
            SELF_CALIBRATION_CLAMP * math.log2(math.e), **self._tile(), TILE=self.tuning.tile,
            Z_PAD=power_of_two(cut.problems), SLOTS=self.tuning.merge_slots,
            CLUSTERED=bool(shape.nodes),
            CALIBRATED=shape.far and self.rule.far_field == "self_calibrated",
            **self._launch(self.tuning.merge_warps, dependent=True),
        )  # fmt: skip
