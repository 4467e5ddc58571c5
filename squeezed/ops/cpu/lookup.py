"""Parallel loops that walk the tree: score nodes, normalise, select, mark children.

`H` key/value heads, `U` units (a request's block of queries), `R` rows of a unit, ordered
`[G, block]`, `W = U * R`, `C` nodes of a level. `state [H, U, C]` says what became of a node; logits
of dead nodes are never read.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from squeezed.ops.cpu.numerics import TILE, dots, exp_nonpositive, log_sum

DEAD, DROPPED, KEPT = np.uint8(0), np.uint8(1), np.uint8(2)
NEG_INF = np.float32(-np.inf)


@njit(cache=True)
def _score_unit(start, stop, base, q, centroids, state, out):
    rows, dim = q.shape
    offsets, nodes = np.empty(TILE, np.int64), np.empty(TILE, np.int64)
    tile = np.empty((rows, TILE), np.float32)
    count = 0
    for node in range(start, stop):
        if state[node] != DEAD:
            nodes[count], offsets[count] = node, base + node * dim
            count += 1
        if count == TILE or (node == stop - 1 and count):
            dots(q, centroids, offsets, count, tile)
            for r in range(rows):
                for t in range(count):
                    out[r, nodes[t]] = tile[r, t]
            count = 0


@njit(cache=True, parallel=True)
def score_nodes(chunk, q, centroids, state, out):
    """First-order logits of all nodes alive, `out [H, W, C]`; `centroids` flat, `q [H, W, D]`."""
    heads, units, nodes = state.shape
    chunks = (nodes + chunk - 1) // chunk
    rows = q.shape[1] // units
    for task in prange(heads * chunks):
        head, start = task // chunks, task % chunks * chunk
        base = head * nodes * q.shape[2]
        for unit in range(units):
            own = slice(unit * rows, (unit + 1) * rows)
            _score_unit(
                start, min(start + chunk, nodes), base, q[head, own], centroids,
                state[head, unit], out[head, own],
            )  # fmt: skip


@njit(cache=True)
def _log_mass(logits, energy, variance, key_offsets, state, wanted):
    """Log of the sum of `size * exp(logit + energy * variance)` over the nodes in a wanted state."""
    masses = np.empty(logits.shape[0], np.float32)
    count = 0
    for node in range(logits.shape[0]):
        if state[node] == wanted:
            size = np.float32(key_offsets[node + 1] - key_offsets[node])
            masses[count] = logits[node] + energy * variance[node] + np.float32(math.log(size))
            count += 1
    top = masses[:count].max() if count else NEG_INF
    mass = np.float32(0.0)
    for i in range(count):
        mass += exp_nonpositive(masses[i] - top)
    return log_sum(mass, top)


@njit(cache=True, parallel=True)
def log_masses(logits, energy, variance, key_offsets, state, wanted, out):
    """Add to `out [H, W]`, in logarithms, the `_log_mass` of every query row.

    `energy [H, W]` weighs `variance [H, C]`; zero scores to first order.
    """
    heads, width = out.shape
    rows = width // state.shape[1]
    for task in prange(heads * width):
        h, w = task // width, task % width
        nodes = _log_mass(
            logits[h, w], energy[h, w], variance[h], key_offsets[h], state[h, w // rows], wanted
        )
        high, low = max(nodes, out[h, w]), min(nodes, out[h, w])
        if low > -np.inf:
            high += np.float32(math.log1p(math.exp(low - high)))
        out[h, w] = high


@njit(cache=True)
def _mean_score(logits, energy, normaliser, variance, valid, score):
    """Raise `score [C]` to the log of the mean over the valid rows of one head of the group."""
    top, mass = np.full(score.shape[0], NEG_INF), np.zeros(score.shape[0], np.float32)
    for r in range(valid.shape[0]):
        if valid[r]:
            for node in range(score.shape[0]):
                log_score = logits[r, node] + energy[r] * variance[node] - normaliser[r]
                top[node] = max(top[node], log_score)
    count = valid.sum()
    if count > 1:
        for r in range(valid.shape[0]):
            if valid[r]:
                for node in range(score.shape[0]):
                    log_score = logits[r, node] + energy[r] * variance[node] - normaliser[r]
                    mass[node] += exp_nonpositive(log_score - top[node])
        for node in range(score.shape[0]):
            top[node] = log_sum(mass[node] / np.float32(count), top[node])
    for node in range(score.shape[0]):
        score[node] = max(score[node], top[node])


@njit(cache=True)
def _select_unit(logits, energy, normaliser, variance, valid, threshold, state):
    block, nodes = valid.shape[0], state.shape[0]
    score = np.full(nodes, NEG_INF)
    for first in range(0, logits.shape[0], block):
        own = slice(first, first + block)
        _mean_score(logits[own], energy[own], normaliser[own], variance, valid, score)
    for node in range(nodes):
        if state[node] != DEAD and score[node] > threshold:
            state[node] = KEPT


@njit(cache=True, parallel=True)
def select(logits, energy, normaliser, variance, valid, threshold, state):
    """Mark what exceeds the log threshold as kept. `valid [U, block]`: padding moves no mean."""
    heads, units, _ = state.shape
    rows = logits.shape[1] // units
    for task in prange(heads * units):
        h, u = task // units, task % units
        own = slice(u * rows, (u + 1) * rows)
        _select_unit(
            logits[h, own], energy[h, own], normaliser[h, own], variance[h], valid[u],
            threshold, state[h, u],
        )  # fmt: skip


@njit(cache=True, parallel=True)
def open_children(state, child_offsets, key_offsets, out):
    """States of the next level, `out [H, U, C']`: alive (dropped until kept) below kept nodes."""
    heads, units, nodes = state.shape
    for task in prange(heads * units):
        h, u = task // units, task % units
        for node in range(nodes):
            kept = state[h, u, node] == KEPT
            for child in range(child_offsets[h, node], child_offsets[h, node + 1]):
                filled = key_offsets[h, child + 1] > key_offsets[h, child]
                out[h, u, child] = DROPPED if kept and filled else DEAD
