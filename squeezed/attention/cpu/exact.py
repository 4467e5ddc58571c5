"""Exact attention over pinned keys, the keys of kept leaves and the suffix, in even tasks.

A *piece* is a range of rows of one head, `[kind, head, start, stop]`, small enough to stay in cache
while every unit reads its own part of it: the bytes of a leaf are read once, however many requests
keep it. A *task* is a run of pieces of one kind and head, with its own softmax sums.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from squeezed.attention.cpu.compiled import compiled
from squeezed.attention.cpu.lookup import KEPT
from squeezed.attention.cpu.numerics import TILE, absorb, dots, prefetch_row

CONTEXT, PINNED, SUFFIX = 0, 1, 2


@compiled
def _absorb_rows(q, keys, values, offsets, count, logits, peak, mass, acc):
    if count:
        for t in range(count):  # the products take long enough for the values to arrive
            prefetch_row(values, offsets[t], q.shape[1])
        dots(q, keys, offsets, count, logits)
        absorb(logits, count, values, offsets, peak, mass, acc)


@compiled
def _all_rows(q, keys, values, first, start, stop, peak, mass, acc):
    """Rows `[start, stop)` of the head whose elements begin at `first`."""
    dim = q.shape[1]
    offsets, logits = np.empty(TILE, np.int64), np.empty((q.shape[0], TILE), np.float32)
    for tile in range(start, stop, TILE):
        count = min(TILE, stop - tile)
        for t in range(count):
            offsets[t] = first + (tile + t) * dim
        _absorb_rows(q, keys, values, offsets, count, logits, peak, mass, acc)


@compiled
def _kept_rows(q, keys, values, first, start, stop, state, key_offsets, peak, mass, acc):
    """Rows in `[start, stop)` whose leaf is kept, gathered into full tiles."""
    dim = q.shape[1]
    offsets, logits = np.empty(TILE, np.int64), np.empty((q.shape[0], TILE), np.float32)
    count = 0
    leaf = np.searchsorted(key_offsets[1:], start, side="right")
    while leaf < state.shape[0] and key_offsets[leaf] < stop:
        if state[leaf] == KEPT:
            for row in range(max(start, key_offsets[leaf]), min(stop, key_offsets[leaf + 1])):
                offsets[count] = first + row * dim
                count += 1
                if count == TILE:
                    _absorb_rows(q, keys, values, offsets, count, logits, peak, mass, acc)
                    count = 0
        leaf += 1
    _absorb_rows(q, keys, values, offsets, count, logits, peak, mass, acc)


@compiled
def _suffix_rows(q, keys, key_at, values, value_at, start, stop, mask, peak, mass, acc):
    """Suffix tokens; `mask [block, S]` repeats for every head of the group.

    `key_at`, `value_at`: the first element and the step between tokens.
    """
    block = mask.shape[0]
    from_key, from_value = np.empty(TILE, np.int64), np.empty(TILE, np.int64)
    logits = np.empty((q.shape[0], TILE), np.float32)
    for tile in range(start, stop, TILE):
        count = min(TILE, stop - tile)
        for t in range(count):
            from_key[t] = key_at[0] + (tile + t) * key_at[1]
            from_value[t] = value_at[0] + (tile + t) * value_at[1]
        dots(q, keys, from_key, count, logits)
        for r in range(q.shape[0]):
            for t in range(count):
                if not mask[r % block, tile + t]:
                    logits[r, t] = -np.inf
        absorb(logits, count, values, from_value, peak, mass, acc)


@compiled
def attend_task(
    pieces,
    q,
    keys,
    values,
    tokens,
    state,
    key_offsets,
    suffix_keys,
    suffix_values,
    strides,
    batch,
    mask,
    peak,
    mass,
    acc,
):
    peak[:], mass[:], acc[:] = -np.inf, 0.0, 0.0
    units = mask.shape[0]
    rows, dim = q.shape[1] // units, q.shape[2]
    for piece in range(pieces.shape[0]):
        kind, head, start, stop = pieces[piece]
        first = head * tokens * dim
        for u in range(units):
            own = slice(u * rows, (u + 1) * rows)
            qu, t, m, a = q[head, own], peak[own], mass[own], acc[own]
            if kind == CONTEXT:
                leaves = state[head, u]
                _kept_rows(qu, keys, values, first, start, stop, leaves, key_offsets[head], t, m, a)
            elif kind == PINNED:
                _all_rows(qu, keys, values, first, start, stop, t, m, a)
            else:
                key_at = (batch[u] * strides[0, 0] + head * strides[0, 1], strides[0, 2])
                value_at = (batch[u] * strides[1, 0] + head * strides[1, 1], strides[1, 2])
                _suffix_rows(
                    qu, suffix_keys, key_at, suffix_values, value_at, start, stop, mask[u], t, m, a
                )


@compiled(parallel=True)
def attend_exact(
    pieces,
    bounds,
    q,
    keys,
    values,
    tokens,
    state,
    key_offsets,
    suffix_keys,
    suffix_values,
    strides,
    batch,
    mask,
    peak,
    mass,
    acc,
):
    """Task `i` works on `pieces[bounds[i]:bounds[i+1]]` and writes `peak, mass [T, W]`, `acc`.

    `q [H, W, D]`; `keys`, `values` flat, `tokens` rows per head; `state [H, U, C]` of the leaves;
    suffix flat, `strides [2, 3]` of its keys and values (batch, head, token), in elements;
    `batch [U]`, `mask [U, block, S]`.
    """
    for task in prange(bounds.shape[0] - 1):
        attend_task(
            pieces[bounds[task] : bounds[task + 1]],
            q,
            keys,
            values,
            tokens,
            state,
            key_offsets,
            suffix_keys,
            suffix_values,
            strides,
            batch,
            mask,
            peak[task],
            mass[task],
            acc[task],
        )
