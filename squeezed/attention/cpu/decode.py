"""Few rows per unit: everything in Numba, from the lookup to the output, bytes read once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from squeezed.attention.cpu import coded, exact, tasks
from squeezed.attention.cpu.arrays import Array, SuffixRows, flat
from squeezed.attention.cpu.nibbles import halved
from squeezed.attention.cpu.rows import QueryRows
from squeezed.attention.cpu.walk import Walk, walk
from squeezed.context.encoding import ENCODINGS
from squeezed.context.layers import ClusteredLayer
from squeezed.context.rule import SelectionRule

PIECE_KEYS = 256  # with their values they stay in the second-level cache while every unit reads
TASKS_PER_THREAD = 16  # evens out what a thread gets


def attend_units(
    rows: QueryRows, layer: ClusteredLayer, rule: SelectionRule, suffix: SuffixRows
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[H, U, R, D]` and log mass `[H, U, R]` float32, and the keys read, `[U]` int64.

    The tree, coarse to fine; then pinned keys, keys of kept leaves and the suffix, cut into even
    tasks; then one merge with the far field.
    """
    found = walk(rows, layer, rule, in_kernel=True)
    q = rows.flat
    pinned = layer.pinned if layer.levels else layer.tokens
    pieces = tasks.cut_pieces(
        found.state, found.key_offsets, pinned, rows.mask.shape[2], PIECE_KEYS
    )
    bounds = tasks.group_pieces(pieces, TASKS_PER_THREAD * torch.get_num_threads())
    width, dim = q.shape[1:]
    peak, mass = np.empty((2, len(bounds) - 1, width), np.float32)
    acc = np.empty((len(bounds) - 1, width, dim), np.float32)
    given = (
        found.state,
        found.key_offsets,
        suffix.keys,
        suffix.values,
        suffix.strides,
        rows.batch.numpy(),
        rows.mask.numpy(),
        peak,
        mass,
        acc,
    )
    levels = None
    if layer.rows.codes is None:
        keys, values = map(flat, layer.rows.plain())
        exact.attend_exact(pieces, bounds, q, keys, values, layer.tokens, *given)
    else:
        levels = np.empty_like(acc)
        coded.attend_coded(pieces, bounds, q, *coded_rows(layer, found), levels, *given)
    if rule.far_field == "second_order" and layer.levels:
        shift = torch.bmm(torch.from_numpy(q), layer.value_slope.float().mT).numpy()
        found.acc += found.moved[..., None] * shift
    output, log_mass = np.empty(q.shape, np.float32), np.empty(q.shape[:2], np.float32)
    far = found.peak, found.mass, found.acc
    tasks.combine(pieces, bounds, peak, mass, acc, *far, output, log_mass)
    if levels is not None:
        output += _of_codes(layer, pieces, bounds, (peak, mass, levels), found)
    found_output = torch.from_numpy(output).view_as(rows.queries)
    found_mass = torch.from_numpy(log_mass).view(found_output.shape[:3])
    return found_output, found_mass, torch.from_numpy(found.keys_read.sum(0))


def coded_rows(layer: ClusteredLayer, found: Walk) -> tuple:
    """Encoded rows as `attend_coded` takes them."""
    rows, codes = layer.rows, layer.rows.codes
    assert codes is not None
    encoding = ENCODINGS[rows.encoding]
    turned = coded.turn(found.q, flat(codes.key_turn))
    shift = np.float32(encoding.zero) * turned.sum(-1)
    return (
        flat(rows.keys),
        flat(rows.values),
        layer.pinned,
        (halved(turned) if encoding.packed else turned, shift, found.visited[-1][2]),
        (flat(codes.keys), flat(codes.values), flat(codes.scales)),
        flat(layer.levels[-1].mean_values),
        (encoding.packed, np.float32(encoding.zero), layer.clustered),
    )


def _of_codes(
    layer: ClusteredLayer,
    pieces: Array,
    bounds: Array,
    parts: tuple[Array, Array, Array],
    found: Walk,
) -> Array:
    """The codes' part of the output `[H, W, D]`, from that of every task; of nodes it has none."""
    assert layer.rows.codes is not None
    levels, mass = np.empty_like(found.q), np.empty_like(found.peak)
    nothing = np.zeros_like(found.acc)
    tasks.combine(pieces, bounds, *parts, found.peak, found.mass, nothing, levels, mass)
    return coded.turn(levels, flat(layer.rows.codes.value_turn))
