"""Few rows per unit: everything in Numba, from the lookup to the output, bytes read once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from squeezed.attention.cpu import exact, tasks
from squeezed.attention.cpu.arrays import SuffixRows, flat
from squeezed.attention.cpu.rows import QueryRows
from squeezed.attention.cpu.walk import walk
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
    exact.attend_exact(
        pieces,
        bounds,
        q,
        *map(flat, layer.rows.plain()),
        layer.tokens,
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
    if rule.far_field == "second_order" and layer.levels:
        shift = torch.bmm(torch.from_numpy(q), layer.value_slope.float().mT).numpy()
        found.acc += found.moved[..., None] * shift
    output, log_mass = np.empty(q.shape, np.float32), np.empty(q.shape[:2], np.float32)
    far = found.peak, found.mass, found.acc
    tasks.combine(pieces, bounds, peak, mass, acc, *far, output, log_mass)
    found_output = torch.from_numpy(output).view_as(rows.queries)
    found_mass = torch.from_numpy(log_mass).view(found_output.shape[:3])
    return found_output, found_mass, torch.from_numpy(found.keys_read.sum(0))
