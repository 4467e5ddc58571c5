"""Cutting the keys to be read into even tasks, and merging what the tasks found."""

from __future__ import annotations

import math

import numpy as np

from squeezed.attention.cpu.compiled import compiled
from squeezed.attention.cpu.exact import CONTEXT, PINNED, SUFFIX
from squeezed.attention.cpu.lookup import KEPT


@compiled
def _kept_by_any(state, leaf):
    for unit in range(state.shape[0]):  # noqa: SIM110, Numba compiles no generators
        if state[unit, leaf] == KEPT:
            return True
    return False


@compiled
def _cut_kept(head, state, key_offsets, piece_keys, pieces, count):
    """Row ranges of one head that hold `piece_keys` keys kept by any unit; large leaves are cut."""
    start, held = np.int64(key_offsets[0]), 0
    for leaf in range(state.shape[1]):
        row, stop = np.int64(key_offsets[leaf]), np.int64(key_offsets[leaf + 1])
        if row < stop and _kept_by_any(state, leaf):
            while held + stop - row >= piece_keys:
                row += piece_keys - held
                pieces[count] = CONTEXT, head, start, row
                count, start, held = count + 1, row, 0
            held += stop - row
    if held:
        pieces[count] = CONTEXT, head, start, np.int64(key_offsets[-1])
        count += 1
    return count


@compiled
def _cut_rows(kind, head, rows, piece_keys, pieces, count):
    for start in range(0, rows, piece_keys):
        pieces[count] = kind, head, start, min(start + piece_keys, rows)
        count += 1
    return count


@compiled
def cut_pieces(state, key_offsets, pinned, suffix, piece_keys):
    """All pieces of all heads, `[N, 4]`, those of one kind and head side by side."""
    heads = state.shape[0]
    most = (key_offsets[:, -1] - key_offsets[:, 0]).sum() + heads * (pinned + suffix)
    pieces, count = np.empty((most // piece_keys + 3 * heads, 4), np.int64), 0
    for head in range(heads):
        count = _cut_kept(head, state[head], key_offsets[head], piece_keys, pieces, count)
        count = _cut_rows(PINNED, head, pinned, piece_keys, pieces, count)
        count = _cut_rows(SUFFIX, head, suffix, piece_keys, pieces, count)
    return pieces[:count]


@compiled
def group_pieces(pieces, tasks):
    """Bounds `[T + 1]` of about `tasks` equal runs of pieces of one kind and head."""
    per_task = max(1, (pieces.shape[0] + tasks - 1) // tasks)
    bounds, count = np.zeros(pieces.shape[0] + 1, np.int64), 0
    for piece in range(pieces.shape[0]):
        first = bounds[count]
        full = piece - first == per_task
        if full or pieces[piece, 0] != pieces[first, 0] or pieces[piece, 1] != pieces[first, 1]:
            count += 1
            bounds[count] = piece
    if pieces.shape[0]:
        count += 1
        bounds[count] = pieces.shape[0]
    return bounds[: count + 1]


@compiled
def _merge_row(tasks, w, peak, mass, acc, far_peak, far_mass, far_acc, out):
    """Softmax over all tasks and the far field of one query row; returns its log mass.

    NaN is no mass of 0: it shows.
    """
    highest = far_peak if far_mass != 0 else np.float32(-np.inf)
    for task in tasks:
        if mass[task, w] != 0:
            highest = max(highest, peak[task, w])
    out[:] = 0.0
    weights = np.float32(0.0)
    if far_mass != 0:
        factor = np.float32(math.exp(far_peak - highest))
        weights += factor * far_mass
        for d in range(out.shape[0]):
            out[d] += factor * far_acc[d]
    for task in tasks:
        if mass[task, w] != 0:
            factor = np.float32(math.exp(peak[task, w] - highest))
            weights += factor * mass[task, w]
            for d in range(out.shape[0]):
                out[d] += factor * acc[task, w, d]
    if weights == 0:
        return np.float32(-np.inf)
    for d in range(out.shape[0]):
        out[d] /= weights
    return np.float32(highest + math.log(weights))


@compiled
def combine(pieces, bounds, peak, mass, acc, far_peak, far_mass, far_acc, out, log_mass):
    """Merge the tasks of every head into `out [H, W, D]` and `log_mass [H, W]`.

    Rows that attend to nothing become 0 and minus infinity.

    Not parallel: waking threads would take longer.
    """
    heads, width, _ = out.shape
    owner = pieces[bounds[:-1], 1]
    for h in range(heads):
        tasks = np.nonzero(owner == h)[0]
        for w in range(width):
            log_mass[h, w] = _merge_row(
                tasks, w, peak, mass, acc, far_peak[h, w], far_mass[h, w], far_acc[h, w], out[h, w]
            )
