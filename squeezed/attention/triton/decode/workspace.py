"""How a decode step is cut into programs, and the scratch memory it needs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from squeezed.attention.triton.decode.selection import RUN
from squeezed.attention.triton.gpus import Gpu

MAX_ROWS = 64
"""Query rows of one tile: requests that share a context times the heads of a group."""


@dataclass(frozen=True)
class Tuning:
    """Block sizes, as measured best for a shape.

    Attributes:
        score_tile: coarsest nodes, pinned or recent rows per step of the first kernel.
        score_programs: programs per multiprocessor that score the coarsest nodes.
        chunk: pinned or recent rows per program.
        nodes: nodes per program of the walk.
        walk_programs: most programs per multiprocessor of the walk.
        write: runs of each kept leaf that one store of the walk appends.
        tile, node_tile: kept rows and dropped nodes per step of the attention kernel.
        node_unit: dropped nodes that weigh as much as 16 kept rows when its work is shared out.
        stages: of the attention kernel's pipeline: indices, loads in flight, arithmetic.
        programs: programs of the attention kernel per multiprocessor.
        warps: of the first, the walking and the attention kernel.
        registers: most per thread of the walking kernel; as many as it likes when `None`.
        attend_registers: likewise of the kernel that attends to encoded rows.
        merge_slots, merge_dims, merge_warps: partial sums and dimensions per step of the last
            kernel, and its warps.
        overlap: start each kernel while its predecessor drains (programmatic dependent launch).
    """

    score_tile: int = 64
    score_programs: int = 4
    chunk: int = 64
    nodes: int = 32
    walk_programs: int = 16
    write: int = 8
    tile: int = 64
    node_tile: int = 64
    node_unit: int = 16
    stages: int = 4
    programs: int = 3
    warps: tuple[int, int, int] = (4, 1, 4)
    registers: int | None = None
    attend_registers: int | None = None
    merge_slots: int = 64
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
    dipole: bool
    gpu: Gpu
    code_bits: int = 0  # of encoded rows


@dataclass(frozen=True)
class Plan:
    """Grids and scratch sizes of one shape. `problems` = KV heads x tiles of requests; `parts` has
    the programs per problem of every launch of the walk, `listers` those beside them in the first
    that list dropped nodes of the coarsest level; nodes of level `i` are numbered from `bounds[i]`
    on."""

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
    listers: int
    bounds: tuple[int, ...]
    programs: int
    fixed_base: int
    slots: int

    @property
    def fixed_slots(self) -> int:
        return self.pinned_chunks + self.recent_chunks

    @property
    def node_row_pad(self) -> int:
        """Rows of a tile in which nodes are scored."""
        return max(8, power_of_two(self.rows))

    @property
    def nested(self) -> bool:
        """Whether nodes of the coarsest level have children."""
        return len(self.bounds) > 2

    @property
    def everyone(self) -> int:
        """All requests of a tile, as bits; a whole word is -1."""
        return -1 if self.tile_batch in (32, 64) else (1 << self.tile_batch) - 1

    @property
    def bits(self) -> torch.dtype:
        return torch.int32 if self.tile_batch <= 32 else torch.int64


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def walkers(shape: Shape, tuning: Tuning, problems: int) -> tuple[tuple[int, ...], int]:
    """Programs per problem of every launch of the walk, and those that the first has besides."""
    most = max(1, tuning.walk_programs * shape.gpu.multiprocessors // problems)
    top, *below = [ceil_div(nodes, tuning.nodes) for nodes in shape.nodes] or [0]
    if not below:
        return (min(top, most),) if top else (), 0
    listers = min(top, ceil_div(most * top, top + below[0])) if shape.far else 0
    rooms = (max(1, most - listers), *(most for _ in below[1:]))
    return tuple(map(min, below, rooms)), listers


@lru_cache(maxsize=256)
def plan(shape: Shape, tuning: Tuning) -> Plan:
    """Cut the work of one decode step."""
    group = shape.heads // shape.kv_heads
    tiles = ceil_div(shape.batch, max(1, MAX_ROWS // group))
    tile_batch = ceil_div(shape.batch, tiles)
    problems = shape.kv_heads * tiles
    nodes = shape.nodes
    parts, listers = walkers(shape, tuning, problems)
    scorers = ceil_div(tuning.score_programs * shape.gpu.multiprocessors, problems)
    splits = min(ceil_div(nodes[0], tuning.score_tile), scorers) if nodes else 0
    pinned_chunks = ceil_div(shape.pinned, tuning.chunk)
    recent_chunks = ceil_div(shape.recent, tuning.chunk)
    programs = tuning.programs * shape.gpu.multiprocessors if nodes else 0
    fixed_base = programs + problems if nodes else 0
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
        listers=listers,
        bounds=tuple(itertools.accumulate(nodes, initial=0)),
        programs=programs,
        fixed_base=fixed_base,
        slots=fixed_base + problems * (pinned_chunks + recent_chunks),
    )


@dataclass(frozen=True)
class Workspace:
    """Scratch of one decode step; nothing in it outlives the step or needs clearing before.

    Attributes:
        scores: `[Z, C, rows]`, selecting scores of the coarsest nodes.
        parents_of: `[Z, C]` int32, the parent of every node of the second level.
        norm_peaks, norm_masses: `[Z, splits, rows]` parts of the normaliser.
        counters: `[Z]` int64: kept runs of rows in the lower half, dropped nodes in the upper.
        read_counts: `[Z, tile_batch]` int32, rows that every request reads.
        states: `[Z, C]` per level from the third on: which requests keep a node's parent.
        runs, run_bits: `[Z, capacity]` int32 kept runs, int64 of encoded rows, and which requests
            keep them; as small as possible when there is one request.
        far_nodes, far_variances, far_logits: `[Z, nodes]` dropped nodes of all levels, their
            variances, and `[Z, nodes, rows]` log2 of their masses, `-inf` for a row whose request
            does not drop the node; as small as possible where the far field needs none.
        sums, peaks, masses: `[slots, rows, D]`, `[slots, rows]` unnormalised softmax sums: of kept
            rows and dropped nodes, and of pinned and recent rows.
        moved: `[slots, rows]`, the dropped nodes' variances in the same sums.
    """

    scores: Tensor
    parents_of: Tensor
    norm_peaks: Tensor
    norm_masses: Tensor
    counters: Tensor
    read_counts: Tensor
    states: tuple[Tensor, ...]
    runs: Tensor
    run_bits: Tensor
    far_nodes: Tensor
    far_variances: Tensor
    far_logits: Tensor
    sums: Tensor
    peaks: Tensor
    masses: Tensor
    moved: Tensor

    @property
    def partials(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.sums, self.peaks, self.masses

    @property
    def kept(self) -> tuple[Tensor, Tensor, int]:
        """The list of kept rows, and its capacity."""
        return self.runs, self.run_bits, self.runs.shape[1]

    @property
    def far(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """The list of dropped nodes, and its capacity."""
        return self.far_nodes, self.far_variances, self.far_logits, self.far_nodes.shape[1]

    @staticmethod
    def allocate(shape: Shape, cut: Plan, device: torch.device) -> Workspace:
        """Take scratch from PyTorch's allocator, which a CUDA graph keeps for its replays."""
        z, rows, levels = cut.problems, cut.rows, len(shape.nodes)
        shared, unused = cut.tile_batch > 1, (1, 1)

        def new(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        runs = ceil_div(shape.tokens - shape.pinned, RUN.value) + shape.nodes[-1] if levels else 1
        far = (z, sum(shape.nodes))
        return Workspace(
            scores=new(z, shape.nodes[0] if levels else 1, rows),
            parents_of=new(z, shape.nodes[1] if levels > 1 else 1, dtype=torch.int32),
            norm_peaks=new(z, max(cut.splits, 1), rows),
            norm_masses=new(z, max(cut.splits, 1), rows),
            counters=new(z, dtype=torch.int64),
            read_counts=new(z, cut.tile_batch, dtype=torch.int32),
            states=tuple(new(z, n, dtype=cut.bits) for n in shape.nodes[2:] or (1,)),
            runs=new(z, runs, dtype=torch.int64 if shape.code_bits else torch.int32),
            run_bits=new(*((z, runs) if shared else unused), dtype=cut.bits),
            far_nodes=new(*(far if shape.far else unused), dtype=torch.int32),
            far_variances=new(*(far if shape.dipole else unused)),
            far_logits=new(*((*far, rows) if shape.far else unused)),
            sums=new(cut.slots, rows, shape.dim),
            peaks=new(cut.slots, rows),
            masses=new(cut.slots, rows),
            moved=new(*((cut.fixed_base, rows) if shape.dipole else unused)),
        )
