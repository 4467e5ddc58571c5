"""How a decode step is cut into programs, and the scratch memory it needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

MAX_ROWS = 64
"""Query rows of one tile: requests that share a context times the heads of a group."""


@dataclass(frozen=True)
class Tuning:
    """Block sizes. `None` lets `plan` choose by the shape.

    Attributes:
        score_tile: coarsest nodes, pinned or recent rows per step of the first kernel.
        chunk: pinned or recent rows per program.
        parents, children: nodes per step of the selection kernel.
        write: rows of each kept leaf that one store of the selection kernel appends.
        select: nodes per program, where the second level is scored in the first kernel.
        score_bytes: most bytes of second-level centroids that are scored whatever their parents;
            0, since only the other way has been measured.
        tile: kept rows per step of the attention kernel.
        stages: of the attention kernel's pipeline: indices, loads in flight, arithmetic.
        programs: programs of the attention kernel per multiprocessor.
        warps: of the first, the selection and the attention kernel.
        select_programs: programs of the selection kernel per multiprocessor.
        select_registers: most registers per thread of the selection kernel; `None` for no limit.
        merge_slots, merge_warps: partial sums per step of the last kernel, and its warps.
        overlap: start each kernel while its predecessor drains (programmatic dependent launch).
    """

    score_tile: int = 64
    chunk: int = 256
    parents: int = 16
    children: int = 32
    write: int = 32
    select: int = 64
    score_bytes: int = 0
    tile: int = 64
    stages: int = 5
    programs: int = 3
    warps: tuple[int, int, int] = (4, 4, 4)
    select_programs: int = 8
    select_registers: int | None = None
    merge_slots: int = 64
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
    multiprocessors: int


@dataclass(frozen=True)
class Plan:
    """Grids and scratch sizes of one shape. `problems` = KV heads x tiles of requests."""

    group: int
    tile_batch: int
    tiles: int
    rows: int
    row_pad: int
    problems: int
    splits: int
    fine_splits: int
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


def scored_at_once(shape: Shape, tuning: Tuning) -> bool:
    """Whether the second level is scored in the first kernel, whatever the parents."""
    if len(shape.nodes) < 2:
        return False
    return 2 * shape.nodes[1] * shape.kv_heads * shape.dim <= tuning.score_bytes


@lru_cache(maxsize=256)
def plan(shape: Shape, tuning: Tuning) -> Plan:
    """Cut the work of one decode step."""
    group = shape.heads // shape.kv_heads
    tiles = ceil_div(shape.batch, max(1, MAX_ROWS // group))
    tile_batch = ceil_div(shape.batch, tiles)
    problems = shape.kv_heads * tiles
    levels = len(shape.nodes)
    share = ceil_div(tuning.select_programs * shape.multiprocessors, problems)
    walked = shape.nodes[: max(levels - 1, 1)]  # levels whose kept nodes a launch expands
    parts = tuple(min(ceil_div(n, tuning.parents), share) for n in walked)
    scored = scored_at_once(shape, tuning)
    if scored:
        blocks = ceil_div(shape.nodes[1], tuning.select)
        blocks += ceil_div(shape.nodes[0], tuning.select) if shape.far else 0
        parts = (blocks, *parts[1:])
    most = ceil_div(8 * shape.multiprocessors, problems)  # enough programs to hide latency
    splits = min(ceil_div(shape.nodes[0], tuning.score_tile), most) if levels else 0
    fine_splits = min(ceil_div(shape.nodes[1], tuning.score_tile), most) if scored else 0
    programs = tuning.programs * shape.multiprocessors if levels else 0
    pinned_chunks = ceil_div(shape.pinned, tuning.chunk)
    recent_chunks = ceil_div(shape.recent, tuning.chunk)
    fixed_base = programs + problems if levels else 0
    far_base = fixed_base + problems * (pinned_chunks + recent_chunks)
    return Plan(
        group=group,
        tile_batch=tile_batch,
        tiles=tiles,
        rows=tile_batch * group,
        row_pad=max(16, power_of_two(tile_batch * group)),
        problems=problems,
        splits=splits,
        fine_splits=fine_splits,
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
        logits: `[Z, rows, C]` first-order logits of the coarsest nodes, in bits.
        fine_logits: `[Z, rows, C]` the same of the second level, where it is scored at once.
        owner: `[Hkv, C]` int32, the parent of every node of the second level, likewise.
        norm_highs, norm_masses: `[Z, splits, rows]` parts of the normaliser.
        counters: `[Z, levels]` int32: kept rows, then kept nodes of every level between.
        read_counts: `[Z, tile_batch]` int32, rows that every request reads.
        kept: per list (rows, then the levels between) `[Z, capacity]` int32.
        kept_bits: the same, which requests; as small as possible when there is one request.
        sums, highs, masses: `[slots, rows, D]`, `[slots, rows]` unnormalised softmax sums.
        estimate_highs, estimate_masses: `[Z, parts, rows]` estimated mass of the kept leaves.
    """

    logits: Tensor
    fine_logits: Tensor
    owner: Tensor
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
        shared = cut.tile_batch > 1

        def new(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        capacities = (shape.tokens - shape.pinned, *shape.nodes[1:-1]) if levels else ()
        masks = [(z, n) if shared else (1, 1) for n in capacities]
        parts = cut.parts[-1] if levels else 1
        fine = shape.nodes[1] if cut.fine_splits else 1
        return Workspace(
            logits=new(z, rows, shape.nodes[0] if levels else 1),
            fine_logits=new(z, rows, fine),
            owner=new(shape.kv_heads, fine, dtype=torch.int32),
            norm_highs=new(z, max(cut.splits, 1), rows),
            norm_masses=new(z, max(cut.splits, 1), rows),
            counters=new(z, max(levels, 1), dtype=torch.int32),
            read_counts=new(z, cut.tile_batch, dtype=torch.int32),
            kept=tuple(new(z, n, dtype=torch.int32) for n in capacities),
            kept_bits=tuple(new(*size, dtype=cut.bits) for size in masks),
            sums=new(cut.slots, rows, shape.dim),
            highs=new(cut.slots, rows),
            masses=new(cut.slots, rows),
            estimate_highs=new(z, parts, rows),
            estimate_masses=new(z, parts, rows),
        )
