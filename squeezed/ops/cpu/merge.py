"""Cutting kept keys into even tasks, and merging what the tasks found."""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from squeezed.ops.cpu.lookup import KEPT
from squeezed.ops.cpu.numerics import log_sum


@njit(cache=True)
def _kept_by_any(state, leaf):
    for unit in range(state.shape[0]):
        if state[unit, leaf] == KEPT:
            return True
    return False


@njit(cache=True)
def cut_pieces(state, key_offsets, piece_keys):
    """Row ranges `[N, 3]` (head, start, stop) that hold `piece_keys` keys kept by any unit.

    Also returns `[H + 1]`, the first piece of every head. Large leaves are cut, too.
    """
    heads, _, nodes = state.shape
    room = (key_offsets[:, -1] - key_offsets[:, 0]).sum() // piece_keys + heads
    pieces, first = np.empty((room, 3), np.int64), np.zeros(heads + 1, np.int64)
    count = 0
    for head in range(heads):
        start, held = np.int64(key_offsets[head, 0]), 0
        for leaf in range(nodes):
            row, stop = np.int64(key_offsets[head, leaf]), np.int64(key_offsets[head, leaf + 1])
            if row < stop and _kept_by_any(state[head], leaf):
                while held + stop - row >= piece_keys:
                    row += piece_keys - held
                    pieces[count] = head, start, np.int64(row)
                    count, start, held = count + 1, row, 0
                held += stop - row
        if held:
            pieces[count] = head, start, np.int64(key_offsets[head, nodes])
            count += 1
        first[head + 1] = count
    return pieces[:count], first


@njit(cache=True)
def group_pieces(first, per_group):
    """Bounds `[T + 1]` of groups of at most `per_group` pieces of one head, and their heads `[T]`."""
    heads = first.shape[0] - 1
    bounds, owner = np.zeros(first[-1] + 1, np.int64), np.empty(first[-1], np.int64)
    count = 0
    for head in range(heads):
        for start in range(first[head], first[head + 1], per_group):
            owner[count] = head
            count += 1
            bounds[count] = min(start + per_group, first[head + 1])
    return bounds[: count + 1], owner[:count]


@njit(cache=True)
def _merge_row(tasks, shift, w, top, mass, acc, out):
    """Softmax over all tasks of one query row; `shift [T]` is added to a task's logits."""
    highest = -np.inf
    for task in tasks:
        if mass[task, w] > 0:
            highest = max(highest, top[task, w] + shift[task])
    out[:] = 0.0
    weights = np.float32(0.0)
    for task in tasks:
        if mass[task, w] > 0:
            factor = np.float32(math.exp(top[task, w] + shift[task] - highest))
            weights += factor * mass[task, w]
            for d in range(out.shape[0]):
                out[d] += factor * acc[task, w, d]
    if weights > 0:
        for d in range(out.shape[0]):
            out[d] /= weights


@njit(cache=True)
def _exact_log_mass(tasks, is_kept, w, top, mass):
    highest, sum_ = np.float32(-np.inf), np.float32(0.0)
    for task in tasks:
        if is_kept[task] and mass[task, w] > 0:
            highest = max(highest, top[task, w])
    for task in tasks:
        if is_kept[task] and mass[task, w] > 0:
            sum_ += mass[task, w] * np.float32(math.exp(top[task, w] - highest))
    return log_sum(sum_, highest)


@njit(cache=True, parallel=True)
def combine(owner, is_kept, is_far, estimate, clamp, top, mass, acc, out):
    """Merge tasks `[T]` of every head `owner[t]` into `out [H, W, D]`; rows of nothing become 0.

    With `clamp > 0` the far field is rescaled by exact over estimated mass of the kept leaves:
    `estimate [H, W]` is the logarithm of the latter, `clamp` bounds the correction in nats.
    """
    heads, width = estimate.shape
    for row in prange(heads * width):
        head, w = row // width, row % width
        tasks = np.nonzero(owner == head)[0]
        shift = np.zeros(owner.shape[0], np.float32)
        if clamp > 0:
            gap = _exact_log_mass(tasks, is_kept, w, top, mass) - estimate[head, w]
            if np.isfinite(gap):  # else nothing was kept: no evidence
                shift[is_far] = min(max(gap, -clamp), clamp)
        _merge_row(tasks, shift, w, top, mass, acc, out[head, w])
