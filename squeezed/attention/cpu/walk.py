"""Query rows -> kept leaves and the far field: the tree from the coarsest level to the leaves."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from squeezed.attention.cpu.arrays import Array, flat
from squeezed.attention.cpu.lookup import DROPPED, descend
from squeezed.attention.cpu.rows import QueryRows
from squeezed.context.layers import ClusteredLayer, Level
from squeezed.context.rule import SelectionRule


class Walk:
    """What the lookup of one call knows so far; it ends at the leaves.

    Attributes:
        visited: of every level `(level, state [H, U, C], first-order logits [H, W, C])`.
        far_energy: `[H, W]`, weight of a dropped node's variance in its mass.
        state: `[H, U, C]` uint8 of the level to visit, in the end of the leaves.
        key_offsets: `[H, C + 1]` int32 of the leaves.
        keys_read: `[H, U]` int64.
        peak, mass, moved, acc: softmax sums of the far field, `[H, W]` and `[H, W, D]`, `moved` of
            the nodes' variances; empty if the kernel does not compute it.
    """

    def __init__(self, rows: QueryRows, nodes: int, far_energy: Array, in_kernel: bool):
        self.rows, self.in_kernel, self.far_energy = rows, in_kernel, far_energy
        self.q = rows.flat
        heads, width, dim = self.q.shape
        self.visited: list[tuple[Level, Array, Array]] = []
        self.state = np.full((heads, rows.units, nodes), DROPPED, np.uint8)
        self.key_offsets = np.zeros((heads, 1), np.int32)
        self.keys_read = np.zeros((heads, rows.units), np.int64)
        self.normaliser = np.empty((heads, width), np.float32)
        self.peak = np.full((heads, width), -np.inf, np.float32)
        self.mass, self.moved = np.zeros((2, heads, width), np.float32)
        self.acc = np.zeros((heads, width, dim if in_kernel else 0), np.float32)

    def visit(self, level: Level, depth: int, below: int, rule: SelectionRule) -> None:
        """Select on one level; `below` nodes on the next."""
        heads, width, _ = self.q.shape
        alpha = None if rule.alpha is None else rule.alpha[depth]
        self.key_offsets = level.key_offsets.contiguous().numpy()
        below_it = level.child_offsets
        children = self.key_offsets if below_it is None else below_it.contiguous().numpy()
        state, self.state = self.state, np.zeros((heads, self.rows.units, below), np.uint8)
        if self.in_kernel:
            logits = np.empty((heads, width, level.nodes), np.float32)
        else:
            logits = torch.bmm(torch.from_numpy(self.q), level.centroids.float().mT).numpy()
        descend(
            self.q,
            flat(level.centroids),
            flat(level.mean_values),
            level.variance.contiguous().numpy(),
            self.key_offsets,
            children,
            energies(self.rows, alpha),
            self.far_energy,
            self.rows.valid.numpy(),
            rule.log_thresholds[depth].numpy(),
            depth == 0,
            self.in_kernel,
            rule.far_field != "none" and self.in_kernel,
            self.normaliser,
            state,
            self.state,
            logits,
            self.keys_read,
            self.peak,
            self.mass,
            self.moved,
            self.acc,
        )
        self.visited.append((level, state, logits))
        if not below:
            self.state = state


def walk(rows: QueryRows, layer: ClusteredLayer, rule: SelectionRule, in_kernel: bool) -> Walk:
    """All levels, coarse to fine.

    `in_kernel`: score only living nodes and sum up the far field in Numba, best for few rows; else
    the logits of all nodes come from one matrix product, and the far field is left to the caller.
    """
    nodes = [*(level.nodes for level in layer.levels), 0]
    found = Walk(rows, nodes[0], energies(rows, rule.far_alpha), in_kernel)
    for depth, level in enumerate(layer.levels):
        found.visit(level, depth, nodes[depth + 1], rule)
    return found


def energies(rows: QueryRows, alpha: Tensor | None) -> Array:
    """`alpha (s |q|)^2 / 2` of every query row, `[H, W]`, from `alpha [Hq]`: the weight of a node's
    variance."""
    heads, units, per_unit, _ = rows.queries.shape
    if alpha is None:
        return np.zeros((heads, units * per_unit), np.float32)
    squares = rows.queries.square().sum(-1).view(heads, units, -1, rows.valid.shape[1])
    return (0.5 * alpha.float().view(heads, 1, -1, 1) * squares).view(heads, -1).numpy()
