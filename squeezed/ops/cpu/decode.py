"""Few rows per unit: everything in Numba, from the lookup to the output, bytes read once.

The journey of a slab of units: the tree, coarse to fine; then the keys of kept leaves, the pinned
keys and the suffix; then one merge with the far field.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from squeezed.config import SELF_CALIBRATION_CLAMP
from squeezed.ops.cpu import exact, tasks
from squeezed.ops.cpu.arrays import Array, Suffix, flat
from squeezed.ops.cpu.lookup import DROPPED, descend
from squeezed.ops.cpu.rows import QueryRows
from squeezed.rule import SelectionRule
from squeezed.tree import ClusteredLayer, Level

PIECE_KEYS = 256  # with their values they stay in the second-level cache while every unit reads
TASKS_PER_THREAD = 16  # evens out what a thread gets

_NO_NODES = np.empty((0, 0), np.int32)


class Walk:
    """What the lookup of one call knows so far; ends at the leaves.

    Attributes:
        state: `[H, U, C]` uint8 of the level to visit, in the end of the leaves.
        key_offsets: `[H, C + 1]` int32 of the leaves.
        keys_read: `[H, U]` int64.
        estimate: `[H, W]`, first-order log mass of the kept leaves.
        top, mass, acc: softmax sums of the far field, `[H, W]`, `[H, W]`, `[H, W, D]`.
    """

    def __init__(self, rows: QueryRows, q: Array, nodes: int):
        heads, width, _ = q.shape
        self.rows, self.q = rows, q
        self.state = np.full((heads, rows.units, nodes), DROPPED, np.uint8)
        self.key_offsets = np.zeros((heads, 1), np.int32)
        self.keys_read = np.zeros((heads, rows.units), np.int64)
        self.normaliser = np.empty((heads, width), np.float32)
        self.estimate = np.empty((heads, width), np.float32)
        self.top = np.full((heads, width), -np.inf, np.float32)
        self.mass = np.zeros((heads, width), np.float32)
        self.acc = np.zeros(q.shape, np.float32)

    def visit(self, level: Level, below: int, threshold: float, alpha, is_first, with_far):
        """Select on one level; `below` nodes on the next."""
        heads, width, _ = self.q.shape
        self.key_offsets = level.key_offsets.contiguous().numpy()
        children = level.child_offsets.contiguous().numpy() if below else _NO_NODES
        state, self.state = self.state, np.zeros((heads, self.rows.units, below), np.uint8)
        descend(
            self.q, flat(level.centroids), flat(level.mean_values),
            level.variance.contiguous().numpy(), self.key_offsets, children,
            energies(self.rows, alpha), self.rows.valid.numpy(), threshold, is_first, with_far,
            self.normaliser, state, self.state, np.empty((heads, width, level.nodes), np.float32),
            self.keys_read, self.estimate, self.top, self.mass, self.acc,
        )  # fmt: skip
        if not below:
            self.state = state


def attend_units(
    rows: QueryRows, layer: ClusteredLayer, rule: SelectionRule, suffix: Suffix
) -> tuple[Tensor, Tensor]:
    """Output `[H, U, R, D]` float32, and the clustered keys that every unit reads, `[U]` int64."""
    q = rows.queries.view(rows.queries.shape[0], -1, rows.queries.shape[3]).numpy()
    found = walk(q, rows, layer, rule)
    pinned = layer.pinned if layer.levels else layer.tokens
    pieces = tasks.cut_pieces(
        found.state, found.key_offsets, pinned, rows.mask.shape[2], PIECE_KEYS
    )
    bounds = tasks.group_pieces(pieces, TASKS_PER_THREAD * torch.get_num_threads())
    width, dim = q.shape[1:]
    top, mass = np.empty((2, len(bounds) - 1, width), np.float32)
    acc = np.empty((len(bounds) - 1, width, dim), np.float32)
    exact.attend_exact(
        pieces, bounds, q, flat(layer.keys), flat(layer.values), layer.tokens, found.state,
        found.key_offsets, suffix.keys, suffix.values, suffix.strides, rows.batch.numpy(),
        rows.mask.numpy(), top, mass, acc,
    )  # fmt: skip
    clamp = SELF_CALIBRATION_CLAMP if rule.far_field == "self_calibrated" else 0.0
    output = np.empty(q.shape, np.float32)
    tasks.combine(
        pieces, bounds, found.estimate, clamp, top, mass, acc, found.top, found.mass, found.acc,
        output,
    )  # fmt: skip
    return torch.from_numpy(output).view_as(rows.queries), torch.from_numpy(found.keys_read.sum(0))


def walk(q: Array, rows: QueryRows, layer: ClusteredLayer, rule: SelectionRule) -> Walk:
    """All levels, coarse to fine."""
    nodes = [*(level.nodes for level in layer.levels), 0]
    found = Walk(rows, q, nodes[0])
    for depth, level in enumerate(layer.levels):
        alpha = None if rule.alpha is None else rule.alpha[depth]
        found.visit(
            level, nodes[depth + 1], float(rule.log_thresholds[depth]), alpha,
            is_first=depth == 0, with_far=rule.far_field != "none",
        )  # fmt: skip
    return found


def energies(rows: QueryRows, alpha: Tensor | None) -> Array:
    """`alpha (s |q|)^2 / 2` of every query row, `[H, W]`: the weight of a node's variance."""
    heads, units, per_unit, _ = rows.queries.shape
    if alpha is None:
        return np.zeros((heads, units * per_unit), np.float32)
    squares = rows.queries.square().sum(-1).view(heads, units, -1, rows.valid.shape[1])
    return (0.5 * alpha.float().view(heads, 1, -1, 1) * squares).view(heads, -1).numpy()
