"""Few rows per unit: everything in Numba, from the lookup to the output, bytes read once.

The journey of a slab of units: pinned keys, whose mass the normaliser needs; the tree, coarse to
fine; the keys of kept leaves; the suffix; the far field; one merge.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from squeezed.config import SELF_CALIBRATION_CLAMP
from squeezed.ops.cpu import kernels, lookup, merge
from squeezed.ops.cpu.arrays import Array, Suffix, flat
from squeezed.ops.cpu.rows import QueryRows
from squeezed.rule import SelectionRule
from squeezed.tree import ClusteredLayer, Level

PINNED_CHUNK = 256  # keys of a task
NODE_CHUNK = 128  # nodes of a task
PIECE_KEYS = 256  # keys that stay in the second-level cache while every unit reads them
TASKS_PER_THREAD = 16


@dataclass(frozen=True)
class Walk:
    """What the lookup found on one level: `state [H, U, C]`, first-order `logits [H, W, C]`."""

    level: Level
    state: Array
    logits: Array
    key_offsets: Array


class Partials:
    """Softmax sums of every task, to be merged: `top`, `mass` `[T, W]` and `acc [T, W, D]`."""

    def __init__(self, tasks: int, q: Array):
        _, width, dim = q.shape
        self.top = np.full((tasks, width), -np.inf, np.float32)
        self.mass = np.zeros((tasks, width), np.float32)
        self.acc = np.zeros((tasks, width, dim), np.float32)

    def log_mass(self, heads: int) -> Array:
        """`[H, W]`, if every head has the same number of tasks, in order."""
        if not len(self.top):
            return np.full((heads, self.top.shape[1]), -np.inf, np.float32)
        logs = self.top + np.log(self.mass)
        return np.logaddexp.reduce(logs.reshape(heads, -1, logs.shape[1]), axis=1)


@dataclass(frozen=True)
class Part:
    """Partials of one kind of keys and the head of each task."""

    partials: Partials
    owner: Array
    is_kept: bool = False
    is_far: bool = False


def attend_units(
    rows: QueryRows, layer: ClusteredLayer, rule: SelectionRule, suffix: Suffix
) -> tuple[Tensor, Tensor]:
    """Output `[H, U, R, D]` float32 and the clustered keys a row of every unit reads, `[U]` int64."""
    heads, units, per_unit, dim = rows.queries.shape
    q = rows.queries.view(heads, units * per_unit, dim).numpy()
    parts = [_pinned(q, layer), _suffix(q, rows, suffix)]
    estimate, clamp = np.zeros(q.shape[:2], np.float32), 0.0
    keys_read = np.zeros(units, np.int64)
    if layer.levels:
        walks = walk(q, rows, layer, rule, parts[0].partials.log_mass(heads))
        leaves = walks[-1]
        parts.append(_kept(q, layer, leaves))
        sizes = np.diff(leaves.key_offsets).astype(np.int64)
        keys_read = np.einsum("huc,hc->u", leaves.state == lookup.KEPT, sizes)
        if rule.far_field != "none":
            parts += [_far(q, found) for found in walks]
        if rule.far_field == "self_calibrated":
            estimate, clamp = kept_estimate(leaves, q), SELF_CALIBRATION_CLAMP
    output = _merged(parts, estimate, clamp, q)
    return torch.from_numpy(output).view_as(rows.queries), torch.from_numpy(keys_read)


def walk(
    q: Array, rows: QueryRows, layer: ClusteredLayer, rule: SelectionRule, pinned: Array
) -> list[Walk]:
    """Every level, coarse to fine. `pinned [H, W]` is the log mass of the pinned keys."""
    heads, width, _ = q.shape
    walks: list[Walk] = []
    valid, normaliser = rows.valid.numpy(), pinned
    for depth, level in enumerate(layer.levels):
        key_offsets = level.key_offsets.contiguous().numpy()
        state = _alive(walks[-1] if walks else None, key_offsets, (heads, rows.units, level.nodes))
        logits = np.empty((heads, width, level.nodes), np.float32)
        lookup.score_nodes(NODE_CHUNK, q, flat(level.centroids), state, logits)
        energy = energies(rows, rule, depth)
        variance = level.variance.contiguous().numpy()
        if depth == 0:
            lookup.log_masses(
                logits, energy, variance, key_offsets, state, lookup.DROPPED, normaliser
            )
        threshold = float(rule.log_thresholds[depth])
        lookup.select(logits, energy, normaliser, variance, valid, threshold, state)
        walks.append(Walk(level, state, logits, key_offsets))
    return walks


def _alive(above: Walk | None, key_offsets: Array, shape: tuple[int, int, int]) -> Array:
    if above is None:
        filled = np.diff(key_offsets) > 0
        return np.broadcast_to(filled[:, None], shape).astype(np.uint8, order="C") * lookup.DROPPED
    state = np.zeros(shape, np.uint8)
    children = above.level.child_offsets.contiguous().numpy()
    lookup.open_children(above.state, children, key_offsets, state)
    return state


def energies(rows: QueryRows, rule: SelectionRule, depth: int) -> Array:
    """`alpha (s |q|)^2 / 2` of every query row, `[H, W]`: the weight of a node's variance."""
    heads, units, per_unit, _ = rows.queries.shape
    if rule.alpha is None:
        return np.zeros((heads, units * per_unit), np.float32)
    block = rows.valid.shape[1]
    alpha = rule.alpha[depth].float().view(heads, 1, -1, 1)
    squares = rows.queries.square().sum(-1).view(heads, units, -1, block)
    return (0.5 * alpha * squares).view(heads, -1).numpy()


def kept_estimate(leaves: Walk, q: Array) -> Array:
    """First-order log mass of the kept leaves, `[H, W]`."""
    estimate = np.full(q.shape[:2], -np.inf, np.float32)
    variance = leaves.level.variance.contiguous().numpy()
    lookup.log_masses(
        leaves.logits, np.zeros_like(estimate), variance, leaves.key_offsets, leaves.state,
        lookup.KEPT, estimate,
    )  # fmt: skip
    return estimate


def _pinned(q: Array, layer: ClusteredLayer) -> Part:
    heads = q.shape[0]
    rows = layer.pinned if layer.levels else layer.tokens
    starts = np.arange(0, rows, PINNED_CHUNK)
    tasks = np.empty((heads, len(starts), 3), np.int64)
    tasks[:, :, 0] = np.arange(heads)[:, None]
    tasks[:, :, 1], tasks[:, :, 2] = starts, np.minimum(starts + PINNED_CHUNK, rows)
    tasks, keys, values = tasks.reshape(-1, 3), flat(layer.keys), flat(layer.values)
    p = Partials(len(tasks), q)
    kernels.attend_pinned(tasks, q, keys, values, layer.tokens, p.top, p.mass, p.acc)
    return Part(p, tasks[:, 0])


def _suffix(q: Array, rows: QueryRows, suffix: Suffix) -> Part:
    p = Partials(q.shape[0], q)
    kernels.attend_suffix(
        q, suffix.keys, suffix.key_strides, suffix.values, suffix.value_strides,
        rows.batch.numpy(), rows.mask.numpy(), p.top, p.mass, p.acc,
    )  # fmt: skip
    return Part(p, np.arange(q.shape[0]))


def _kept(q: Array, layer: ClusteredLayer, leaves: Walk) -> Part:
    pieces, first = merge.cut_pieces(leaves.state, leaves.key_offsets, PIECE_KEYS)
    per_group = -(-len(pieces) // (TASKS_PER_THREAD * torch.get_num_threads())) or 1
    groups, owner = merge.group_pieces(first, per_group)
    p = Partials(len(owner), q)
    kernels.attend_kept(
        pieces, groups, q, flat(layer.keys), flat(layer.values), layer.tokens, leaves.state,
        leaves.key_offsets, p.top, p.mass, p.acc,
    )  # fmt: skip
    return Part(p, owner, is_kept=True)


def _far(q: Array, found: Walk) -> Part:
    heads = q.shape[0]
    chunks = -(-found.level.nodes // NODE_CHUNK)
    p = Partials(heads * chunks, q)
    kernels.attend_far(
        NODE_CHUNK, flat(found.level.mean_values), found.state, found.key_offsets, found.logits,
        p.top, p.mass, p.acc,
    )  # fmt: skip
    return Part(p, np.repeat(np.arange(heads), chunks), is_far=True)


def _merged(parts: list[Part], estimate: Array, clamp: float, q: Array) -> Array:
    def per_task(values) -> Array:
        return np.repeat(values, [len(part.owner) for part in parts])

    output = np.empty(q.shape, np.float32)
    merge.combine(
        np.concatenate([part.owner for part in parts]),
        per_task([part.is_kept for part in parts]),
        per_task([part.is_far for part in parts]),
        estimate,
        clamp,
        *(
            np.concatenate([getattr(part.partials, name) for part in parts])
            for name in ("top", "mass", "acc")
        ),
        output,
    )
    return output
