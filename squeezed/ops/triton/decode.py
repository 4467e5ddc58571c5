"""One new token over a clustered context: the launcher of the decode kernels.

From query to output without a host synchronisation and with static shapes, so that a CUDA graph can
hold the step: `open` scores the first levels and attends to pinned and recent rows; `select` or
`descend`, one per further level, lists what is kept; `attend` reads those rows; `combine` merges.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import torch
import triton
from torch import Tensor

from squeezed.config import SELF_CALIBRATION_CLAMP
from squeezed.errors import SqueezedError
from squeezed.ops.triton import attention, descend, lookup, select
from squeezed.ops.triton.workspace import (
    Shape,
    Tuning,
    Workspace,
    ceil_div,
    plan,
    power_of_two,
    scored_at_once,
)
from squeezed.rule import SelectionRule
from squeezed.tree import ClusteredLayer

MAX_GROUP = 16
MAX_DIM = 256
INTERPRETED_MULTIPROCESSORS = 2


def attend(
    query: Tensor,
    layer: ClusteredLayer,
    rule: SelectionRule,
    suffix_keys: Tensor,
    suffix_values: Tensor,
    suffix_mask: Tensor | None,
    scale: float,
    tuning: Tuning | None = None,
) -> tuple[Tensor, Tensor]:
    """Squeezed attention of one new token per request; equals `squeezed.ops.reference.attend`.

    Args:
        query: `[B, Hq, 1, D]`, bfloat16 or float16; `D` a multiple of 16 up to 256, `Hq / Hkv` up
            to 16. Requests that share the context read every kept cluster once.
        layer: the context's clustered keys and values, contiguous.
        rule: thresholds, score and far field.
        suffix_keys, suffix_values: `[B, Hkv, S, D]`, may be views of a static buffer.
        suffix_mask: `[B, 1, 1, S]` bool, True where attended; `None` attends to all of them.
        scale: softmax scale.
        tuning: block sizes; chosen by the shape when `None`.

    Returns:
        Output `[B, Hq, 1, D]`, and the clustered keys read per request `[B]` int64, over all heads.

    Raises:
        SqueezedError: an unsupported shape, dtype or layout.
    """
    check(query, layer, suffix_keys, suffix_values)
    shape = shape_of(query, layer, suffix_keys, rule.far_field != "none")
    tuning = tuning or chosen_tuning(shape)
    step = _Step(query, layer, rule, suffix_keys, suffix_values, suffix_mask, scale, shape, tuning)
    step.open()
    for stage in range(len(step.cut.parts)):
        step.select() if stage == 0 and step.cut.fine_splits else step.descend(stage)
    if layer.levels:
        step.attend()
    step.combine()
    return step.output, step.keys_read


def check(query: Tensor, layer: ClusteredLayer, suffix_keys: Tensor, suffix_values: Tensor) -> None:
    """Refuse what the kernels cannot do, in one line."""
    _, heads, rows, dim = query.shape
    kv_heads = layer.keys.shape[0]
    if rows != 1:
        raise SqueezedError(f"query: decode takes 1 token per request, got {rows}; use prefill")
    if query.dtype not in (torch.bfloat16, torch.float16):
        raise SqueezedError(
            f"query: expected bfloat16 or float16, got {query.dtype}; cast, or use 'reference'"
        )
    if dim % 16 or not 16 <= dim <= MAX_DIM:
        raise SqueezedError(
            f"query: expected a head dimension that is a multiple of 16 up to {MAX_DIM}, got {dim};"
            " use implementation 'reference'"
        )
    if heads % kv_heads or heads // kv_heads > MAX_GROUP:
        raise SqueezedError(
            f"query: expected 1 to {MAX_GROUP} query heads per KV head, got {heads} for {kv_heads};"
            " use implementation 'reference'"
        )
    for name, tensor in (("suffix_keys", suffix_keys), ("suffix_values", suffix_values)):
        if tensor.stride(-1) != 1 or tensor.stride() != suffix_keys.stride():
            raise SqueezedError(
                f"{name}: expected rows contiguous and keys and values laid out alike, got strides "
                f"{tensor.stride()}; call contiguous()"
            )
    for name, tensor in (("layer.keys", layer.keys), ("layer.values", layer.values)):
        if not tensor.is_contiguous() or tensor.dtype != query.dtype:
            raise SqueezedError(
                f"{name}: expected contiguous {query.dtype}, got {tensor.dtype} with strides "
                f"{tensor.stride()}; index the context in the model's dtype"
            )


def shape_of(query: Tensor, layer: ClusteredLayer, suffix_keys: Tensor, far: bool) -> Shape:
    """Sizes on which the launches depend."""
    return Shape(
        batch=query.shape[0],
        heads=query.shape[1],
        kv_heads=layer.keys.shape[0],
        dim=query.shape[3],
        tokens=layer.tokens,
        pinned=layer.pinned if layer.levels else layer.tokens,
        recent=suffix_keys.shape[2],
        nodes=tuple(level.nodes for level in layer.levels),
        far=far and bool(layer.levels),
        multiprocessors=multiprocessors(query.device),
    )


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def chosen_tuning(shape: Shape) -> Tuning:
    """Block sizes by shape, from sweeps on an H200."""
    chosen = Tuning(overlap=shape.multiprocessors != INTERPRETED_MULTIPROCESSORS)
    if scored_at_once(shape, chosen) or shape.batch * shape.heads > 16 * shape.kv_heads:
        return chosen
    # So many nodes that throughput counts, not latency: one warp per program needs no barriers.
    return replace(chosen, children=16, warps=(4, 1, 4), select_programs=32)


class _Step:
    """The launches of one decode step over one scratch."""

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
