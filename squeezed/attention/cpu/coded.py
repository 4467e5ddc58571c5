"""Exact attention over encoded rows of kept leaves, in the even tasks of `exact`.

A row is its leaf's means and a difference in codes (`squeezed.context.encoding`): the mean's part
of a logit is what the lookup found, and its part of the output is one weight for the leaf. The
codes' part is added up as the codes lie, and turned by who joins the tasks.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from squeezed.attention.cpu.compiled import compiled
from squeezed.attention.cpu.exact import CONTEXT, attend_task
from squeezed.attention.cpu.lookup import KEPT
from squeezed.attention.cpu.nibbles import add_lower, nibble_dots, upper_codes
from squeezed.attention.cpu.numerics import (
    TILE,
    add_values,
    dots,
    exp_nonpositive,
    load,
    prefetch_row,
    weigh,
)


@compiled(parallel=True)
def turn(rows, matrices):
    """`rows[h] @ matrices[h]` of `[H, W, D]` and of square matrices, flat, as they are stored."""
    heads, width, dim = rows.shape
    out, whole = np.zeros((heads, width, dim), np.float32), dim - dim % 4
    for h in prange(heads):
        offsets = (h * dim + np.arange(dim)) * dim
        add_values(rows[h], whole, matrices, offsets, out[h])
        for d in range(whole, dim):
            for r in range(width):
                for e in range(dim):
                    out[h, r, e] += rows[h, r, d] * load(matrices, offsets[d] + e)
    return out


@compiled
def _logits(turned, shift, of_leaves, codes, scales, packed, place, count, logits):
    """Of `count` rows, `[R, TILE]`: that of the leaf's mean key and that of the difference."""
    offsets, rows, leaves = place
    if packed:
        nibble_dots(turned, codes, offsets, count, logits)
    else:
        dots(turned, codes, offsets, count, logits)
    for r in range(turned.shape[0]):
        for t in range(count):
            difference = load(scales, 2 * rows[t]) * (logits[r, t] - shift[r])
            logits[r, t] = of_leaves[r, leaves[t]] + difference


@compiled
def _shrink(before, peak, lower, upper, weight):
    """What was summed under an older maximum, under the new one; `weigh` does so with `acc`."""
    for r in range(peak.shape[0]):
        if peak[r] > before[r]:
            factor = exp_nonpositive(before[r] - peak[r])
            weight[r] *= factor
            for d in range(lower.shape[1]):
                lower[r, d] *= factor
            for d in range(upper.shape[1]):
                upper[r, d] *= factor


@compiled
def _add_means(weights, leaves, count, mean_values, first, acc):
    """Each leaf's mean value with the weight of its rows; those of a leaf lie side by side."""
    dim, start = acc.shape[1], 0
    for t in range(1, count + 1):
        if t == count or leaves[t] != leaves[start]:
            base = first + leaves[start] * dim
            for r in range(acc.shape[0]):
                own, total = acc[r], np.float32(0.0)
                for s in range(start, t):
                    total += weights[r, s]
                for d in range(dim):
                    own[d] += total * load(mean_values, base + d)
            start = t


@compiled
def _add_codes(weights, count, codes, scales, packed, rows, offsets, lower, upper, weight):
    """Codes with the weights of their rows times their scales, and these summed up."""
    for r in range(weight.shape[0]):
        for t in range(count):
            weights[r, t] *= load(scales, 2 * rows[t] + 1)
            weight[r] += weights[r, t]
    if packed:
        add_lower(weights, count, codes, offsets, lower)
        add_values(weights, count, codes, offsets, upper)
    else:
        add_values(weights, count, codes, offsets, lower)


@compiled
def _absorb(queries, codes, means, packed, place, count, logits, sums, coded):
    """Add `count <= TILE` rows to the softmax sums and to those of the codes."""
    if not count:
        return
    keys, values, scales = codes
    turned, shift, of_leaves = queries
    offsets, rows, leaves = place
    peak, mass, acc = sums
    for t in range(count):
        prefetch_row(values, offsets[t], coded[0].shape[1])
    _logits(turned, shift, of_leaves, keys, scales, packed, place, count, logits)
    padded, before = (count + 3) // 4 * 4, peak.copy()
    for t in range(count, padded):
        offsets[t], rows[t] = offsets[count - 1], rows[count - 1]
        logits[:, t] = -np.inf
    for r in range(turned.shape[0]):
        weigh(logits, padded, r, peak, mass, acc)
    _shrink(before, peak, *coded)
    _add_means(logits, leaves, count, *means, acc)
    _add_codes(logits, padded, values, scales, packed, rows, offsets, *coded)


@compiled
def _kept_rows(queries, codes, means, packed, first, start, stop, state, key_offsets, sums, coded):
    """Rows in `[start, stop)` whose leaf is kept, gathered into full tiles.

    `first`: the number among all code rows that row 0 of the head would have.
    """
    width = coded[0].shape[1]
    offsets, rows = np.empty(TILE, np.int64), np.empty(TILE, np.int64)
    leaves, logits = np.empty(TILE, np.int64), np.empty((sums[0].shape[0], TILE), np.float32)
    place, count = (offsets, rows, leaves), 0
    leaf = np.searchsorted(key_offsets[1:], start, side="right")
    while leaf < state.shape[0] and key_offsets[leaf] < stop:
        if state[leaf] == KEPT:
            for row in range(max(start, key_offsets[leaf]), min(stop, key_offsets[leaf + 1])):
                rows[count], leaves[count] = first + row, leaf
                offsets[count] = rows[count] * width
                count += 1
                if count == TILE:
                    _absorb(queries, codes, means, packed, place, count, logits, sums, coded)
                    count = 0
        leaf += 1
    _absorb(queries, codes, means, packed, place, count, logits, sums, coded)


@compiled
def _coded_task(pieces, queries, codes, means, form, state, key_offsets, units, out):
    peak, mass, acc, levels = out
    peak[:], mass[:], acc[:] = -np.inf, 0.0, 0.0
    packed, zero, clustered = form
    turned, shift, of_leaves = queries
    _, width, dim = turned.shape
    rows, pinned, half = width // units, key_offsets[0, 0], dim // 2 if packed else dim
    lower = np.zeros((width, half), np.float32)
    upper = np.zeros((width, dim - half), np.float32)  # of whole bytes
    weight = np.zeros(width, np.float32)
    for piece in range(pieces.shape[0]):
        _, head, start, stop = pieces[piece]
        first = head * clustered - pinned
        of_head = (means, head * state.shape[2] * dim)
        for u in range(units):
            own = slice(u * rows, (u + 1) * rows)
            sums, coded = (peak[own], mass[own], acc[own]), (lower[own], upper[own], weight[own])
            _kept_rows(
                (turned[head, own], shift[head, own], of_leaves[head, own]),
                codes,
                of_head,
                packed,
                first,
                start,
                stop,
                state[head, u],
                key_offsets[head],
                sums,
                coded,
            )
    for r in range(width):
        for d in range(half):
            levels[r, d] = lower[r, d] - zero * weight[r]
        for d in range(dim - half):
            levels[r, half + d] = upper_codes(upper[r, d], lower[r, d]) - zero * weight[r]


@compiled(parallel=True)
def attend_coded(
    pieces,
    bounds,
    q,
    keys,
    values,
    pinned,
    queries,
    codes,
    means,
    form,
    levels,
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
    """As `exact.attend_exact`, of a layer with encoded rows.

    `keys`, `values` are the `pinned` plain rows per head; `queries` those that the codes see,
    `[H, W, D]` and halved if two share a byte, their sums times the code of zero `[H, W]`, and the
    first-order logits of the leaves `[H, W, C]`; `codes` the flat codes of keys and of values and
    the scales of both; `means` the leaves' mean values, flat;
    `form`: whether two codes share a byte, which code means 0, and encoded rows per head. Writes
    `levels [T, W, D]`, with the same weights as `acc`, before `value_turn`.
    """
    units = mask.shape[0]
    for task in prange(bounds.shape[0] - 1):
        own = pieces[bounds[task] : bounds[task + 1]]
        if own[0, 0] == CONTEXT:
            out = (peak[task], mass[task], acc[task], levels[task])
            _coded_task(own, queries, codes, means, form, state, key_offsets, units, out)
        else:
            levels[task] = 0.0
            attend_task(
                own,
                q,
                keys,
                values,
                pinned,
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
