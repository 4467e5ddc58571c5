"""Blocks of queries -> lists of what each block reads, on the device and without a host copy.

The tree is walked level by level, in two launches each: `select_kernel` scores the candidates of a
block of queries, 128 nodes per program, and counts what it keeps; `expand_kernel` turns the kept
nodes into the list of their members: the candidates of the next level, or rows of sorted keys.
Every list is written in ascending order from prefix sums, so a run gives the same bytes each time.

A *tile* is one (request, KV head, block of queries), numbered `(b * Hkv + h) * N + n`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from squeezed.attention.triton import gpus
from squeezed.attention.triton.prefill.expand import expand_kernel
from squeezed.attention.triton.prefill.normaliser import normaliser_kernel
from squeezed.attention.triton.prefill.select import select_kernel
from squeezed.context.layers import ClusteredLayer, Level
from squeezed.context.rule import SelectionRule

NODES_PER_PROGRAM = 128


@dataclass(frozen=True)
class Geometry:
    """Sizes of one prefill call, in the letters of the house."""

    batch: int
    kv_heads: int
    group: int
    rows: int  # query tokens, Q
    block: int  # query tokens that select together
    dim: int

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.block)

    @property
    def tiles(self) -> int:
        return self.batch * self.kv_heads * self.blocks


@dataclass(frozen=True)
class NodeList:
    """Per tile, `nodes[t, :count[t]]` in ascending order; the rest is unwritten.

    Attributes:
        nodes: `[T, capacity]` int32; of stride 0 if all tiles share one list.
        log_size: `[T, capacity]` float32, log2 of the keys each stands for; empty if not needed.
        variance: `[T, capacity]` float32, of the keys each stands for; empty if not needed.
        count: `[T]` int32.
    """

    nodes: Tensor
    log_size: Tensor
    variance: Tensor
    count: Tensor


@dataclass(frozen=True)
class Found:
    """What every tile reads.

    Attributes:
        rows: rows of the sorted keys that are read exactly, the pinned ones first.
        dropped: per level, the nodes whose far field counts; empty without a far field.
    """

    rows: NodeList
    dropped: tuple[NodeList, ...]

    @staticmethod
    def all_rows(sizes: Geometry, layer: ClusteredLayer) -> Found:
        """Of a context without a tree, where every row is pinned."""
        device = layer.device
        rows = torch.arange(layer.tokens, dtype=torch.int32, device=device)
        count = torch.full((sizes.tiles,), layer.tokens, dtype=torch.int32, device=device)
        nothing = rows.new_empty(0, dtype=torch.float32)
        return Found(NodeList(rows.expand(sizes.tiles, -1), nothing, nothing, count), ())


def lookup(
    query: Tensor,
    layer: ClusteredLayer,
    rule: SelectionRule,
    sizes: Geometry,
    valid: Tensor | None,
) -> Found:
    """Walk the tree from the coarsest level down for every block of queries.

    Args:
        query: `[B, Hq, Q, D]`, last dimension contiguous.
        valid: `[B, Q]` int8, nonzero where the row is no padding; `None` if all are valid.
    """
    if not layer.levels:
        return Found.all_rows(sizes, layer)
    partial = _normaliser(query, layer, rule, sizes)
    candidates, dropped = None, []
    for depth in range(len(layer.levels)):
        walk = _Step(sizes, layer, rule, depth)
        state, counts = walk.select(query, valid, partial, candidates)
        candidates, gone = walk.expand(state, counts, candidates)
        dropped += [gone] if rule.far_field != "none" else []
    assert candidates is not None  # the tree has a level
    return Found(candidates, tuple(dropped))


def geometry(query: Tensor, layer: ClusteredLayer, rule: SelectionRule) -> Geometry:
    batch, heads, rows, dim = query.shape
    kv_heads = layer.kv_heads
    block = min(rule.query_block, max(16, triton.next_power_of_2(rows)))  # few to compile for
    return Geometry(batch, kv_heads, heads // kv_heads, rows, block, dim)


def row_tile(rows: int, query: Tensor) -> int:
    """Rows of a tile of queries: a power of two the tensor cores accept, fewer of wide ones."""
    most = 32 if query.dtype == torch.float32 else 128 if query.shape[-1] <= 128 else 64
    return min(most, max(16, triton.next_power_of_2(rows)))


def _normaliser(
    query: Tensor, layer: ClusteredLayer, rule: SelectionRule, sizes: Geometry
) -> Tensor:
    """Shares of the log2 of every row's estimated denominator, `[B, Hq, Q, splits]`."""
    level, heads = layer.levels[0], query.shape[1]
    block_r = row_tile(sizes.rows, query)
    row_tiles = sizes.batch * heads * triton.cdiv(sizes.rows, block_r)
    wanted = triton.cdiv(2 * gpus.of(query.device).multiprocessors, row_tiles)
    share = 64 * triton.cdiv(level.nodes, 64 * wanted)  # nodes that one program adds up
    splits = triton.cdiv(level.nodes, share)
    partial = query.new_empty(sizes.batch, heads, sizes.rows, splits, dtype=torch.float32)
    grid = (row_tiles, splits)
    normaliser_kernel[grid](
        (query, *query.stride()[:3]),
        (level.centroids, level.variance, level.key_offsets),
        alpha_of(rule, 0, query),
        partial,
        sizes.rows,
        level.nodes,
        splits,
        share,
        layer.scale,
        HEADS=heads,
        GROUP=sizes.group,
        DIM=sizes.dim,
        BLOCK_D=triton.next_power_of_2(sizes.dim),
        BLOCK_R=block_r,
        BLOCK_C=64,
        SECOND=rule.alpha is not None,
        num_warps=4,
        num_stages=3,
    )
    return partial


def alpha_of(rule: SelectionRule, depth: int, query: Tensor) -> Tensor:
    """The level's weights `[Hq]`, or any tensor where the kernel reads none."""
    return query if rule.alpha is None else rule.alpha[depth]


@dataclass(frozen=True)
class _Step:
    """One level of the walk."""

    sizes: Geometry
    layer: ClusteredLayer
    rule: SelectionRule
    depth: int

    @property
    def level(self) -> Level:
        return self.layer.levels[self.depth]

    @property
    def chunks(self) -> int:
        return triton.cdiv(self.level.nodes, NODES_PER_PROGRAM)

    def _level(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For the kernels; a kept node stands for its children, or at the leaves for its rows."""
        level = self.level
        members = level.key_offsets if level.child_offsets is None else level.child_offsets
        return level.centroids, level.variance, level.key_offsets, members

    def select(
        self,
        query: Tensor,
        valid: Tensor | None,
        partial: Tensor,
        candidates: NodeList | None,
    ) -> tuple[Tensor, Tensor]:
        """Fate of every candidate `[T, C]` int8 (1 kept, 2 dropped) and counts `[2, T, chunks]`."""
        level, sizes = self.level, self.sizes
        state = query.new_empty(sizes.tiles, level.nodes, dtype=torch.int8)
        counts = query.new_empty(2, sizes.tiles, self.chunks, dtype=torch.int32)
        splits = partial.shape[-1]
        programs, settings = self._select_programs(query.device)
        spans = min(self.chunks, triton.cdiv(programs, sizes.tiles))
        select_kernel[(sizes.tiles * spans,)](
            (query, *query.stride()[:3]),
            query if valid is None else valid,
            self._level(),
            alpha_of(self.rule, self.depth, query),
            partial,
            _listed(candidates, state),
            state,
            counts,
            sizes.rows,
            level.nodes,
            sizes.blocks,
            self.chunks,
            sizes.tiles,
            splits,
            spans,
            self.layer.scale,
            self.rule.log_thresholds[self.depth],
            HEADS_KV=sizes.kv_heads,
            GROUP=sizes.group,
            BLOCK=sizes.block,
            DIM=sizes.dim,
            BLOCK_D=triton.next_power_of_2(sizes.dim),
            BLOCK_R=row_tile(sizes.block, query),
            BLOCK_C=NODES_PER_PROGRAM,
            SPLITS=triton.next_power_of_2(splits),
            SECOND=self.rule.alpha is not None,
            MASKED=valid is not None,
            LISTED=candidates is not None,
            FAR=self.rule.far_field != "none",
            num_stages=2,
            **settings,
        )
        return state, counts

    def _select_programs(self, device: torch.device) -> tuple[int, dict[str, int]]:
        """How many programs select, and how they are compiled: measured on an H200.

        One tile of queries stays in shared memory while nodes go by; those of a group's heads are
        fetched anew for every chunk of nodes, which more and smaller programs hide.
        """
        sizes, gpu = self.sizes, gpus.of(device)
        if sizes.group > 1 or sizes.dim > 128:
            return 4 * gpu.multiprocessors, {"num_warps": 8} | gpu.two_programs_of_8_warps()
        warps = 8 if sizes.tiles <= gpu.multiprocessors else 4
        return 2 * gpu.multiprocessors, {"num_warps": warps}

    def expand(
        self, state: Tensor, counts: Tensor, candidates: NodeList | None
    ) -> tuple[NodeList, NodeList]:
        """Lists of the kept nodes' members and of the dropped nodes."""
        level, sizes, leaf = self.level, self.sizes, self.level.child_offsets is None
        capacity = self.layer.tokens if leaf else self.layer.levels[self.depth + 1].nodes
        far, dipole = self.rule.far_field != "none", self.rule.far_field == "second_order"
        members = _new_list(sizes, capacity, state.device)
        dropped = _new_list(sizes, level.nodes if far else 0, state.device, far, dipole)
        expand_kernel[(sizes.tiles * self.chunks,)](
            self._level(),
            _listed(candidates, state),
            state,
            counts,
            (members.nodes, members.count),
            (dropped.nodes, dropped.log_size, dropped.variance, dropped.count),
            level.nodes,
            sizes.blocks,
            self.chunks,
            sizes.tiles,
            capacity,
            self.layer.pinned if leaf else 0,
            HEADS_KV=sizes.kv_heads,
            BLOCK_C=NODES_PER_PROGRAM,
            CHUNKS=triton.next_power_of_2(self.chunks),
            RUN=8,
            LISTED=candidates is not None,
            FAR=far,
            DIPOLE=dipole,
            num_warps=4,
        )
        return members, dropped


def _listed(candidates: NodeList | None, unused: Tensor) -> tuple[Tensor, Tensor]:
    return (unused, unused) if candidates is None else (candidates.nodes, candidates.count)


def _new_list(
    sizes: Geometry, capacity: int, device: torch.device, far: bool = False, dipole: bool = False
) -> NodeList:
    nodes = torch.empty(sizes.tiles, capacity, dtype=torch.int32, device=device)
    log_sizes = torch.empty(sizes.tiles, capacity if far else 0, device=device)
    variances = torch.empty(sizes.tiles, capacity if dipole else 0, device=device)
    count = torch.empty(sizes.tiles, dtype=torch.int32, device=device)
    return NodeList(nodes, log_sizes, variances, count)
