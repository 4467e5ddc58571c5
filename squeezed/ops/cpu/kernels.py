"""Parallel loops of the CPU decode path. Every loop runs over tasks that `decode` has cut evenly.

`H` key/value heads, `U` units (a request's block of queries), `R` rows of a unit (group x block),
`W = U * R`. A task adds to its own `top, mass [T, W]` and `acc [T, W, D]`; `combine` merges them.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from squeezed.ops.cpu.lookup import DROPPED, KEPT
from squeezed.ops.cpu.numerics import TILE, absorb, dots


@njit(cache=True)
def _absorb_rows(q, keys, values, offsets, count, logits, top, mass, acc):
    if count:
        dots(q, keys, offsets, count, logits)
        absorb(logits, count, values, offsets, top, mass, acc)


@njit(cache=True)
def _pinned_task(task, q, keys, values, tokens, top, mass, acc):
    """Rows `[start, stop)` of a head for all its queries at once."""
    head, start, stop = task[0], task[1], task[2]
    dim = q.shape[1]
    offsets, logits = np.empty(TILE, np.int64), np.empty((q.shape[0], TILE), np.float32)
    for first in range(start, stop, TILE):
        count = min(TILE, stop - first)
        for t in range(count):
            offsets[t] = (head * tokens + first + t) * dim
        _absorb_rows(q, keys, values, offsets, count, logits, top, mass, acc)


@njit(cache=True, parallel=True)
def attend_pinned(tasks, q, keys, values, tokens, top, mass, acc):
    """Tasks `[T, 3]`: head, first row, last row + 1. `q [H, W, D]`; `keys`, `values` are flat."""
    for task in prange(tasks.shape[0]):
        _pinned_task(
            tasks[task], q[tasks[task, 0]], keys, values, tokens, top[task], mass[task], acc[task]
        )


@njit(cache=True)
def _kept_piece(head, start, stop, unit, q, keys, values, tokens, state, owned, top, mass, acc):
    """Rows in `[start, stop)` whose leaf this unit keeps, gathered into full tiles."""
    dim = q.shape[1]
    offsets, logits = np.empty(TILE, np.int64), np.empty((q.shape[0], TILE), np.float32)
    count = 0
    leaf = np.searchsorted(owned[1:], start, side="right")
    while leaf < state.shape[0] and owned[leaf] < stop:
        if state[leaf] == KEPT:
            for row in range(max(start, owned[leaf]), min(stop, owned[leaf + 1])):
                offsets[count] = (head * tokens + row) * dim
                count += 1
                if count == TILE:
                    _absorb_rows(q, keys, values, offsets, count, logits, top, mass, acc)
                    count = 0
        leaf += 1
    _absorb_rows(q, keys, values, offsets, count, logits, top, mass, acc)


@njit(cache=True, parallel=True)
def attend_kept(pieces, groups, q, keys, values, tokens, state, key_offsets, top, mass, acc):
    """Pieces `[N, 3]` as in `attend_pinned`; task `i` owns pieces `groups[i]:groups[i+1]` of a head.

    A piece is small enough to stay in cache while every unit takes its own leaves from it, so the
    bytes of a leaf are read once however many requests keep it. `state [H, U, C]`.
    """
    units = state.shape[1]
    rows = q.shape[1] // units
    for task in prange(groups.shape[0] - 1):
        for piece in range(groups[task], groups[task + 1]):
            head, start, stop = pieces[piece, 0], pieces[piece, 1], pieces[piece, 2]
            for unit in range(units):
                own = slice(unit * rows, (unit + 1) * rows)
                _kept_piece(
                    head, start, stop, unit, q[head, own], keys, values, tokens,
                    state[head, unit], key_offsets[head], top[task, own], mass[task, own], acc[task, own],
                )  # fmt: skip


@njit(cache=True)
def _suffix_unit(q, keys, key_base, key_step, values, value_base, value_step, mask, top, mass, acc):
    """All suffix rows for one unit; `mask [block, S]` repeats for every head of the group."""
    block, suffix = mask.shape
    key_at, value_at = np.empty(TILE, np.int64), np.empty(TILE, np.int64)
    logits = np.empty((q.shape[0], TILE), np.float32)
    for first in range(0, suffix, TILE):
        count = min(TILE, suffix - first)
        for t in range(count):
            key_at[t] = key_base + (first + t) * key_step
            value_at[t] = value_base + (first + t) * value_step
        dots(q, keys, key_at, count, logits)
        for r in range(q.shape[0]):
            for t in range(count):
                if not mask[r % block, first + t]:
                    logits[r, t] = -np.inf
        absorb(logits, count, values, value_at, top, mass, acc)


@njit(cache=True, parallel=True)
def attend_suffix(q, keys, key_strides, values, value_strides, unit_batch, mask, top, mass, acc):
    """One task per head and unit. `keys`, `values` flat, strides (batch, head, token) in elements."""
    units = mask.shape[0]
    rows = q.shape[1] // units
    for task in prange(q.shape[0] * units):
        head, unit = task // units, task % units
        batch = unit_batch[unit]
        own = slice(unit * rows, (unit + 1) * rows)
        _suffix_unit(
            q[head, own],
            keys, batch * key_strides[0] + head * key_strides[1], key_strides[2],
            values, batch * value_strides[0] + head * value_strides[1], value_strides[2],
            mask[unit], top[head, own], mass[head, own], acc[head, own],
        )  # fmt: skip


@njit(cache=True)
def _far_unit(start, stop, values, base, state, key_offsets, logits, top, mass, acc):
    """Dropped nodes in `[start, stop)`, each as one key of mass `size * exp(logit)`."""
    rows, dim = acc.shape
    offsets, tile = np.empty(TILE, np.int64), np.empty((rows, TILE), np.float32)
    count = 0
    for node in range(start, stop):
        if state[node] == DROPPED:
            offsets[count] = base + node * dim
            log_size = np.float32(math.log(key_offsets[node + 1] - key_offsets[node]))
            for r in range(rows):
                tile[r, count] = logits[r, node] + log_size
            count += 1
        if count == TILE or (node == stop - 1 and count):
            absorb(tile, count, values, offsets, top, mass, acc)
            count = 0


@njit(cache=True, parallel=True)
def attend_far(chunk, values, state, key_offsets, logits, top, mass, acc):
    """One task per head and `chunk` of nodes of one level. `logits [H, W, C]`, first order."""
    heads, units, nodes = state.shape
    chunks = (nodes + chunk - 1) // chunk
    rows = logits.shape[1] // units
    for task in prange(heads * chunks):
        head, start = task // chunks, task % chunks * chunk
        for unit in range(units):
            own = slice(unit * rows, (unit + 1) * rows)
            _far_unit(
                start, min(start + chunk, nodes), values, head * nodes * acc.shape[2],
                state[head, unit], key_offsets[head], logits[head, own],
                top[task, own], mass[task, own], acc[task, own],
            )  # fmt: skip
