"""How a decode step is cut into programs, and the scratch memory it needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from squeezed.ops.triton.selection import RUN

MAX_ROWS = 64
"""Query rows of one tile: requests that share a context times the heads of a group."""


@dataclass(frozen=True)
class Tuning:
    """Block sizes, as measured best for a shape.

    Attributes:
        score_tile: coarsest nodes, pinned or recent rows per step of the first kernel.
        score_programs: programs per multiprocessor that score the coarsest nodes.
        chunk: pinned or recent rows per program.
        share: parents per program of the walk.
        children: nodes that a program of the walk scores at once.
        eager: score children before it is known whose parents are kept: more bytes, less waiting.
        write: runs of each kept leaf that one store of the walk appends.
        list_programs: programs per multiprocessor where parents come from a list.
        tile: kept rows per step of the attention kernel.
        stages: of the attention kernel's pipeline: indices, loads in flight, arithmetic.
        programs: programs of the attention kernel per multiprocessor.
        warps: of the first, the walking and the attention kernel. Eight in the walk fault with
            64 query rows and 32 children (Triton 3.6).
        merge_slots, merge_dims, merge_warps: partial sums and dimensions per step of the last
            kernel, and its warps.
        overlap: start each kernel while its predecessor drains (programmatic dependent launch).
    """

    score_tile: int = 64
    score_programs: int = 4
    chunk: int = 64
    share: int = 16
    children: int = 64
    eager: bool = False
    write: int = 8
    list_programs: int = 8
    tile: int = 64
    stages: int = 4
    programs: int = 3
    warps: tuple[int, int, int] = (4, 4, 4)
    merge_slots: int = 128
    merge_dims: int = 32
    merge_warps: int = 4
    overlap: bool = True


@dataclass(frozen=True)
class Shape:
    """Sizes on which launches depend. `nodes` and `members` run from coarse to fine levels."""

    batch: int
    heads: int
    kv_heads: int
    dim: int
    tokens: int
    pinned: int
    recent: int
    nodes: tuple[int, ...]
    far: bool
    calibrated: bool
    multiprocessors: int


@dataclass(frozen=True)
class Plan:
    """Grids and scratch sizes of one shape. `problems` = KV heads x tiles of requests; `parts` has
    the programs per problem of every launch of the walk."""

    group: int
    tile_batch: int
    tiles: int
    rows: int
    row_pad: int
    problems: int
    splits: int
    pinned_chunks: int
    recent_chunks: int
    parts: tuple[int, ...]
    programs: int
    fixed_base: int
    far_base: int
    slots: int

    @property
    def fixed_slots(self) -> int:
        return self.pinned_chunks + self.recent_chunks

    @property
    def bits(self) -> torch.dtype:
        return torch.int32 if self.tile_batch <= 32 else torch.int64


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@lru_cache(maxsize=256)
def plan(shape: Shape, tuning: Tuning) -> Plan:
    """Cut the work of one decode step."""
    group = shape.heads // shape.kv_heads
    tiles = ceil_div(shape.batch, max(1, MAX_ROWS // group))
    tile_batch = ceil_div(shape.batch, tiles)
    problems = shape.kv_heads * tiles
    nodes = shape.nodes
    most = ceil_div(tuning.list_programs * shape.multiprocessors, problems)
    if len(nodes) == 1:
        parts: tuple[int, ...] = (ceil_div(nodes[0], tuning.children),)
    else:
        parts = tuple(ceil_div(n, tuning.share) for n in nodes[:-1])
        parts = parts[:1] + tuple(min(n, most) for n in parts[1:])
    scorers = ceil_div(tuning.score_programs * shape.multiprocessors, problems)
    splits = min(ceil_div(nodes[0], tuning.score_tile), scorers) if nodes else 0
    pinned_chunks = ceil_div(shape.pinned, tuning.chunk)
    recent_chunks = ceil_div(shape.recent, tuning.chunk)
    programs = tuning.programs * shape.multiprocessors if nodes else 0
    fixed_base = programs + problems if nodes else 0
    far_base = fixed_base + problems * (pinned_chunks + recent_chunks)
    return Plan(
        group=group,
        tile_batch=tile_batch,
        tiles=tiles,
        rows=tile_batch * group,
        row_pad=max(16, power_of_two(tile_batch * group)),
        problems=problems,
        splits=splits,
        pinned_chunks=pinned_chunks,
        recent_chunks=recent_chunks,
        parts=parts,
        programs=programs,
        fixed_base=fixed_base,
        far_base=far_base,
        slots=far_base + (problems * sum(parts) if shape.far else 0),
    )


@dataclass(frozen=True)
class Workspace:
    """Scratch of one decode step; nothing in it outlives the step or needs clearing before.

    Attributes:
        norm_highs, norm_masses: `[Z, splits, rows]` parts of the normaliser.
        counters: `[Z, levels]` int32: kept runs of rows, then kept nodes of every level between.
        read_counts: `[Z, tile_batch]` int32, rows that every request reads.
        kept: lists `[Z, capacity]` int32: runs of rows, then nodes per level between.
        kept_bits: the same, which requests; as small as possible when there is one request.
        sums, highs, masses: `[slots, rows, D]`, `[slots, rows]` unnormalised softmax sums: of kept
            rows, of pinned and recent rows, of the far field.
        estimate_highs, estimate_masses: `[Z, parts, rows]` estimated mass of the kept leaves.
    """

    norm_highs: Tensor
    norm_masses: Tensor
    counters: Tensor
    read_counts: Tensor
    kept: tuple[Tensor, ...]
    kept_bits: tuple[Tensor, ...]
    sums: Tensor
    highs: Tensor
    masses: Tensor
    estimate_highs: Tensor
    estimate_masses: Tensor

    @staticmethod
    def allocate(shape: Shape, cut: Plan, device: torch.device) -> Workspace:
        """Take scratch from PyTorch's allocator, which a CUDA graph keeps for its replays."""
        z, rows, levels = cut.problems, cut.rows, len(shape.nodes)

        def new(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        runs = ceil_div(shape.tokens - shape.pinned, RUN.value) + shape.nodes[-1] if levels else 1
        capacities = (runs, *shape.nodes[1:-1])
        masks = [(z, n) if cut.tile_batch > 1 else (1, 1) for n in capacities]
        parts = cut.parts[-1] if levels else 1
        known = (z, parts, rows) if shape.calibrated else (1, 1, 1)
        return Workspace(
            norm_highs=new(z, max(cut.splits, 1), rows),
            norm_masses=new(z, max(cut.splits, 1), rows),
            counters=new(z, max(levels, 1), dtype=torch.int32),
            read_counts=new(z, cut.tile_batch, dtype=torch.int32),
            kept=tuple(new(z, n, dtype=torch.int32) for n in capacities),
            kept_bits=tuple(new(*size, dtype=cut.bits) for size in masks),
            sums=new(cut.slots, rows, shape.dim),
            highs=new(cut.slots, rows),
            masses=new(cut.slots, rows),
            estimate_highs=new(*known),
            estimate_masses=new(*known),
        )
