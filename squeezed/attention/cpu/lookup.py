"""The walk down the tree, one level per call: score, normalise, select, far field, children.

`H` key/value heads, `U` units (a request's block of queries), `R` rows of a unit, ordered
`[G, block]`, `W = U * R`, `C` nodes of a level. `state [H, U, C]` says what became of a node; the
logits of dead nodes are never read.
"""

from __future__ import annotations

import math

import numpy as np
from numba import prange

from squeezed.attention.cpu.compiled import compiled
from squeezed.attention.cpu.numerics import (
    TILE,
    absorb,
    dots,
    exp_nonpositive,
    log_sum,
    prefetch_row,
)

DEAD, DROPPED, KEPT = np.uint8(0), np.uint8(1), np.uint8(2)
NEG_INF = np.float32(-np.inf)
LOWEST = np.finfo(np.float32).min


@compiled
def _score(q, centroids, base, state, logits):
    """First-order logits of all nodes that are not dead."""
    rows, dim = q.shape
    offsets, nodes = np.empty(TILE, np.int64), np.empty(TILE, np.int64)
    tile = np.empty((rows, TILE), np.float32)
    count, last = 0, state.shape[0] - 1
    for node in range(last + 1):
        if state[node] != DEAD:
            nodes[count], offsets[count] = node, base + node * dim
            prefetch_row(centroids, offsets[count], dim)
            count += 1
        if count == TILE or (node == last and count):
            dots(q, centroids, offsets, count, tile)
            for r in range(rows):
                for t in range(count):
                    logits[r, nodes[t]] = tile[r, t]
            count = 0


@compiled
def _log_mass(logits, energy, variance, key_offsets, state, wanted):
    """Log of the sum of `size * exp(logit + energy * variance)` over nodes in the wanted state."""
    terms = np.empty(logits.shape[0], np.float32)
    peak = NEG_INF
    for node in range(logits.shape[0]):
        term = logits[node] + energy * variance[node]
        terms[node] = term if state[node] == wanted else NEG_INF
        peak = max(peak, terms[node])
    mass, peak = np.float32(0.0), max(peak, LOWEST)  # without any mass, minus infinity stays below
    for node in range(logits.shape[0]):
        size = np.float32(key_offsets[node + 1] - key_offsets[node])
        mass += size * exp_nonpositive(terms[node] - peak)
    return log_sum(mass, peak)


@compiled
def _mean_score(logits, energy, normaliser, variance, valid, score):
    """Raise `score [C]` to the log of the mean over the valid rows of one head of the group.

    A row of NaN, which its normaliser shows, reads everything, so that nothing is hidden.
    """
    for r in range(valid.shape[0]):
        if valid[r] and math.isnan(normaliser[r]):
            score[:] = np.inf
            return
    peak, mass = np.full(score.shape[0], NEG_INF), np.zeros(score.shape[0], np.float32)
    for r in range(valid.shape[0]):
        if valid[r]:
            for node in range(score.shape[0]):
                log_score = logits[r, node] + energy[r] * variance[node] - normaliser[r]
                peak[node] = max(peak[node], log_score)
    count = valid.sum()
    if count > 1:
        for r in range(valid.shape[0]):
            if valid[r]:
                for node in range(score.shape[0]):
                    log_score = logits[r, node] + energy[r] * variance[node] - normaliser[r]
                    mass[node] += exp_nonpositive(log_score - peak[node])
        for node in range(score.shape[0]):
            peak[node] = log_sum(mass[node] / np.float32(count), peak[node])
    for node in range(score.shape[0]):
        score[node] = max(score[node], peak[node])


@compiled
def _select(logits, energy, normaliser, variance, valid, threshold, state):
    """Mark as kept what exceeds the log threshold."""
    block, nodes = valid.shape[0], state.shape[0]
    score = np.full(nodes, NEG_INF)
    for first in range(0, logits.shape[0], block):
        own = slice(first, first + block)
        _mean_score(logits[own], energy[own], normaliser[own], variance, valid, score)
    for node in range(nodes):
        if state[node] != DEAD and score[node] > threshold:
            state[node] = KEPT


@compiled
def _add_far(values, base, state, key_offsets, logits, energy, variance, peak, mass, moved, acc):
    """Every dropped node as one key of mass `size * exp(logit + energy * variance)` and the node's
    mean value; `moved` sums its variance with the same weights."""
    rows, dim = acc.shape
    offsets, tile = np.empty(TILE, np.int64), np.empty((rows, TILE), np.float32)
    own_variance = np.zeros(TILE, np.float32)
    count, last = 0, state.shape[0] - 1
    for node in range(last + 1):
        if state[node] == DROPPED:
            log_size = np.float32(math.log(key_offsets[node + 1] - key_offsets[node]))
            offsets[count] = base + node * dim
            own_variance[count] = variance[node]
            prefetch_row(values, offsets[count], dim)
            for r in range(rows):
                tile[r, count] = logits[r, node] + energy[r] * variance[node] + log_size
            count += 1
        if count == TILE or (node == last and count):
            before = peak.copy()
            absorb(tile, count, values, offsets, peak, mass, acc)
            for r in range(rows):
                moved[r] *= exp_nonpositive(before[r] - peak[r]) if peak[r] > before[r] else 1
                for t in range(count):
                    moved[r] += tile[r, t] * own_variance[t]
            count = 0


@compiled
def _open_children(state, child_offsets, below):
    """Children of kept nodes are alive: dropped, until they are kept themselves."""
    for node in range(state.shape[0]):
        for child in range(child_offsets[node], child_offsets[node + 1]):
            below[child] = DROPPED if state[node] == KEPT else DEAD


@compiled
def _bury_empty(state, key_offsets):
    for node in range(state.shape[0]):
        if key_offsets[node + 1] == key_offsets[node]:
            state[node] = DEAD


@compiled
def _kept_keys(key_offsets, state):
    keys = 0
    for node in range(state.shape[0]):
        if state[node] == KEPT:
            keys += key_offsets[node + 1] - key_offsets[node]
    return keys


@compiled
def _visit_unit(
    h,
    u,
    q,
    centroids,
    mean_values,
    variance,
    key_offsets,
    child_offsets,
    energy,
    far_energy,
    valid,
    threshold,
    is_first,
    to_score,
    with_far,
    normaliser,
    state,
    below,
    logits,
    keys_read,
    peak,
    mass,
    moved,
    acc,
):
    base = h * state.shape[0] * q.shape[1]
    _bury_empty(state, key_offsets)
    if to_score:
        _score(q, centroids, base, state, logits)
    if is_first:
        for r in range(q.shape[0]):
            normaliser[r] = _log_mass(logits[r], energy[r], variance, key_offsets, state, DROPPED)
    _select(logits, energy, normaliser, variance, valid, threshold, state)
    if with_far:
        _add_far(
            mean_values,
            base,
            state,
            key_offsets,
            logits,
            far_energy,
            variance,
            peak,
            mass,
            moved,
            acc,
        )
    if below.shape[0]:
        _open_children(state, child_offsets, below)
    else:
        keys_read[h, u] = _kept_keys(key_offsets, state)


@compiled(parallel=True)
def descend(
    q,
    centroids,
    mean_values,
    variance,
    key_offsets,
    child_offsets,
    energy,
    far_energy,
    valid,
    threshold,
    is_first,
    to_score,
    with_far,
    normaliser,
    state,
    below,
    logits,
    keys_read,
    peak,
    mass,
    moved,
    acc,
):
    """One level for every head and unit.

    Reads `q [H, W, D]`, the level (centroids and mean values flat), `energy [H, W]`, the weight of
    the variance in scores, and `far_energy [H, W]`, that in the far field, `valid [U, block]`:
    padding moves no mean, and the log `threshold [H]`. Writes `normaliser [H, W]` at the first
    level, `logits [H, W, C]` if `to_score` (else they are given), `state`, and `below`, the states
    of the next level, which has no nodes at the leaves; there `keys_read [H, U]` is written. The
    far field is added to the softmax sums `peak, mass, moved [H, W]`, `acc [H, W, D]`.
    """
    units = state.shape[1]
    rows = q.shape[1] // units
    for task in prange(state.shape[0] * units):
        h, u = task // units, task % units
        own = slice(u * rows, (u + 1) * rows)
        _visit_unit(
            h,
            u,
            q[h, own],
            centroids,
            mean_values,
            variance[h],
            key_offsets[h],
            child_offsets[h],
            energy[h, own],
            far_energy[h, own],
            valid[u],
            threshold[h],
            is_first,
            to_score,
            with_far,
            normaliser[h, own],
            state[h, u],
            below[h, u],
            logits[h, own],
            keys_read,
            peak[h, own],
            mass[h, own],
            moved[h, own],
            acc[h, own],
        )
