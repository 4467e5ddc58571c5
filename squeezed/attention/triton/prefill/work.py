"""Launcher of the prefill attention: from lists to the output, in three launches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from squeezed.attention.interface import Suffix
from squeezed.attention.scores import LOG2E, owners
from squeezed.attention.triton import gpus
from squeezed.attention.triton.prefill.attention import attention_kernel
from squeezed.attention.triton.prefill.hopper import kernel as prefill_hopper
from squeezed.attention.triton.prefill.hopper.kernel import aligned, hopper_attention_kernel
from squeezed.attention.triton.prefill.lookup import Found, Geometry, NodeList
from squeezed.attention.triton.prefill.plan import combine_kernel, plan_kernel
from squeezed.attention.triton.rows import code_bits, in_16_bits, views
from squeezed.config import FarField
from squeezed.context.layers import ClusteredLayer, Level
from squeezed.context.rule import SelectionRule


@dataclass(frozen=True)
class Tile:
    """Shape of the attention kernel: query rows and keys of a tile, and how it is compiled."""

    rows: int
    keys: int
    warps: int
    stages: int
    programs: int  # per multiprocessor
    stretches: int = 2  # programs that share a tile: more fit the cache better, and merge more
    others: int = 0  # keys of the suffix and nodes in a tile, if not as many
    hopper: bool = False  # by the kernel of `prefill_hopper`


def choose_tile(query: Tensor, sizes: Geometry, far_field: FarField, coded: bool = False) -> Tile:
    """The shape measured best on an H200 (benchmarks/h200/prefill-tiles.json).

    Encoded rows are read by the kernel for any GPU alone: with two sums of values its tiles are
    small.
    """
    rows = max(16, triton.next_power_of_2(sizes.group * sizes.block))
    if coded:
        most = 32 if gpus.of(query.device).small and sizes.dim > 128 else 64
        return Tile(min(rows, most), 32, warps=4, stages=2, programs=2)
    if prefill_hopper.fits(query, rows, sizes.dim):
        return Tile(**prefill_hopper.SHAPE, stretches=1, hopper=True)
    if query.dtype == torch.float32:
        return Tile(min(rows, 32), 32, warps=4, stages=2, programs=2)
    if sizes.dim > 128:
        return Tile(min(rows, 64), 32, warps=4, stages=2, programs=2)
    if rows < 128:
        return Tile(rows, 64, warps=4, stages=3, programs=2)
    if far_field == "second_order" or gpus.of(query.device).small:  # two programs would spill
        return Tile(128, 64, warps=8, stages=2, programs=1)
    if far_field != "none":
        return Tile(128, 64, warps=8, stages=2, programs=2)
    if sizes.tiles <= gpus.of(query.device).multiprocessors:
        return Tile(128, 64, warps=8, stages=4, programs=1)
    return Tile(128, 128, warps=8, stages=3, programs=1)


@dataclass(frozen=True)
class Work:
    """The attention of one call: its tiles laid out as a line of units, shared by programs."""

    sizes: Geometry
    layer: ClusteredLayer
    rule: SelectionRule
    found: Found
    tile: Tile

    @property
    def split_m(self) -> int:
        return triton.cdiv(self.sizes.group * self.sizes.block, self.tile.rows)

    @property
    def pass_tiles(self) -> int:
        """Tiles that run side by side."""
        return triton.cdiv(self.programs, self.tile.stretches)

    @property
    def programs(self) -> int:
        return gpus.of(self.layer.device).multiprocessors * self.tile.programs

    @property
    def dipole(self) -> bool:
        return self.far_levels > 0 and self.rule.far_field == "second_order"

    @property
    def far_levels(self) -> int:
        return len(self.found.dropped)

    @property
    def classes(self) -> int:
        return 2 + self.far_levels

    def plan(self, valid: Tensor | None, suffix: Suffix | None) -> tuple[Tensor, ...]:
        """`ends [W]`, `bounds [W, classes]` int32 and keys read `[B]` int64."""
        sizes, device = self.sizes, self.layer.device
        spans = sizes.tiles * self.split_m
        ends = torch.empty(spans, dtype=torch.int32, device=device)
        bounds = torch.empty(spans, self.classes, dtype=torch.int32, device=device)
        keys_read = torch.empty(sizes.batch, dtype=torch.int64, device=device)
        found = self.found
        plan_kernel[(1,)](
            (ends, bounds),
            keys_read,
            found.rows.count,
            tuple(gone.count for gone in found.dropped),
            ends if valid is None else _valid_per_block(valid, sizes),
            sizes.tiles,
            sizes.blocks,
            sizes.rows,
            _tokens(suffix),
            self.layer.pinned,
            sizes.batch,
            HEADS_KV=sizes.kv_heads,
            SPLIT_M=self.split_m,
            BLOCK=sizes.block,
            BLOCK_N=self.tile.keys,
            OTHER_N=self.tile.others or self.tile.keys,
            LEVELS=self.far_levels,
            CLASSES=self.classes,
            MASKED=valid is not None,
            CAUSAL=_is_causal(suffix),
            STEP=1024,
            num_warps=8,
        )
        return ends, bounds, keys_read

    def attend_lists(
        self, query: Tensor, suffix: Suffix | None, ends: Tensor, bounds: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs, log2 masses and summed variances of all stretches."""
        sizes, tile, layer = self.sizes, self.tile, self.layer
        found, dropped = self.found.rows, self.found.dropped
        levels = layer.levels[: self.far_levels]
        partials = self._partials(query)
        keys = values = query  # any tensors where there is nothing to read
        mask, mask_strides = bounds, (0, 0, 0)
        if suffix is not None:
            keys, values = suffix.keys, suffix.values
        if suffix is not None and suffix.mask is not None:
            mask, mask_strides = suffix.mask.view(torch.int8), _mask_strides(suffix.mask)
        if tile.hopper:
            keys, values = map(aligned, (keys, values))
        kernel, settings = self._kernel(query)
        kernel[(self.programs,)](
            (query, *query.stride()[:3]),
            in_16_bits(layer.rows),
            layer.rows.keys.shape[1],
            (keys, *keys.stride()[:3]),
            (values, *values.stride()[:3]),
            mask,
            *mask_strides,
            (ends, bounds),
            (found.nodes, found.count),
            _by_field(levels, "centroids", "mean_values", "nodes"),
            _by_field(dropped, "nodes", "log_size", "variance", "count"),
            self.rule.far_alpha if self.dipole else query,
            partials,
            sizes.tiles,
            sizes.blocks,
            sizes.rows,
            _tokens(suffix),
            found.nodes.stride(0),
            self.pass_tiles,
            layer.scale * LOG2E,
            HEADS_KV=sizes.kv_heads,
            GROUP=sizes.group,
            BLOCK=sizes.block,
            DIM=sizes.dim,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.keys,
            SPLIT_M=self.split_m,
            LEVELS=self.far_levels,
            CLASSES=self.classes,
            DIPOLE=self.dipole,
            CAUSAL=_is_causal(suffix),
            STEP=512,
            num_warps=tile.warps,
            **settings,
        )
        return partials

    def _kernel(self, query: Tensor) -> tuple[triton.JITFunction, dict[str, Any]]:
        """The kernel of the tile's shape, and what only that one takes."""
        tile, dim = self.tile, self.sizes.dim
        if tile.hopper:
            return hopper_attention_kernel, {"STAGES": tile.stages, "OTHER_N": tile.others}
        bits, gpu = code_bits(self.layer.rows), gpus.of(query.device)
        settings: dict[str, Any] = dict(
            coding=self.coding(),
            BLOCK_D=triton.next_power_of_2(dim),
            BITS=bits,
            PART=max(16, triton.next_power_of_2(dim * bits // 16)),
            PTX=gpu.ptx,
            num_stages=tile.stages,
        )
        if tile.programs * tile.warps == 16:
            settings |= gpu.two_programs_of_8_warps()
        return attention_kernel, settings

    def coding(self) -> tuple | None:
        """Of encoded rows codes and scales, means and sizes of leaves, and how they are turned."""
        layer, codes = self.layer, self.layer.rows.codes
        if codes is None:
            return None
        leaves = layer.levels[-1]
        leaf_of = owners(leaves.key_offsets, layer.tokens).int()
        return (
            (codes.keys.view(torch.int16), *views(codes)[1:], codes.tokens),
            (leaves.centroids, leaves.mean_values, leaves.nodes),
            (leaf_of, layer.pinned),
            (codes.key_turn, codes.value_turn),
        )

    def _partials(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        spans = self.sizes.tiles * self.split_m
        slots = spans + triton.cdiv(spans, self.pass_tiles) * self.programs
        outputs = query.new_empty(slots, self.tile.rows, self.sizes.dim, dtype=torch.float32)
        moved = outputs.new_empty(outputs.shape[:2] if self.dipole else (0, 0))
        return outputs, outputs.new_empty(outputs.shape[:2]), moved

    def combine(
        self,
        query: Tensor,
        valid: Tensor | None,
        ends: Tensor,
        bounds: Tensor,
        partials: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Output and log mass."""
        sizes, tile = self.sizes, self.tile
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        log_mass = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        grid = (sizes.tiles * self.split_m, triton.cdiv(tile.rows, 16))
        combine_kernel[grid](
            (query, *query.stride()[:3]),
            self.layer.value_slope,
            output,
            log_mass,
            ends if valid is None else valid,
            (ends, bounds),
            partials,
            sizes.tiles,
            sizes.blocks,
            sizes.rows,
            self.programs,
            self.pass_tiles,
            self.layer.scale,
            HEADS_KV=sizes.kv_heads,
            GROUP=sizes.group,
            BLOCK=sizes.block,
            DIM=sizes.dim,
            BLOCK_D=triton.next_power_of_2(sizes.dim),
            BLOCK_M=tile.rows,
            BLOCK_R=16,
            SPLIT_M=self.split_m,
            CLASSES=self.classes,
            DIPOLE=self.dipole,
            MASKED=valid is not None,
            BLOCK_K=min(128, triton.next_power_of_2(sizes.dim)),
            num_warps=4,
        )
        return output, log_mass


def _tokens(suffix: Suffix | None) -> int:
    return 0 if suffix is None else suffix.tokens


def _by_field(records: Iterable[Level | NodeList], *fields: str) -> tuple[tuple, ...]:
    """Each field of all records, for the kernels."""
    return tuple(tuple(getattr(record, field) for record in records) for field in fields)


def _is_causal(suffix: Suffix | None) -> bool:
    return suffix is None or suffix.mask is None


def _mask_strides(mask: Tensor) -> tuple[int, int, int]:
    """Request, query and key strides of `[B or 1, 1, Q, S]`."""
    per_request = mask.stride(0) if mask.shape[0] > 1 else 0
    return per_request, mask.stride(2), mask.stride(3)


def _valid_per_block(valid: Tensor, sizes: Geometry) -> Tensor:
    """Valid rows of every block of queries, `[B, N]` int32."""
    missing = sizes.blocks * sizes.block - sizes.rows
    padded = torch.nn.functional.pad(valid, (missing, 0)).view(sizes.batch, sizes.blocks, -1)
    return padded.sum(-1, dtype=torch.int32)
