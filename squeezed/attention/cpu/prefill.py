"""Many rows per unit: gather the kept keys once per unit and head, leave the rest to products.

Selection is the same Numba kernel as in decode, fed with the logits of one batched product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from squeezed.attention.cpu.arrays import SuffixRows
from squeezed.attention.cpu.gathered import CodedRows, PlainRows, kept_rows
from squeezed.attention.cpu.lookup import DROPPED, KEPT
from squeezed.attention.cpu.rows import QueryRows
from squeezed.attention.cpu.walk import Walk, walk
from squeezed.context.layers import ClusteredLayer
from squeezed.context.rule import SelectionRule

MOST_LOGITS = 1 << 23  # of one product; more rows are worked on in turns

Part = tuple[Tensor, Callable[[Tensor], Tensor]]
"""Logits `[rows, n]` float32, and what weighs the values with as many weights, `[rows, D]`."""


@dataclass(frozen=True)
class Gathered:
    """What one unit of one head reads, kept and pinned rows apart.

    `far_logits [R, F]`, `far_values [F, D]` and `far_variance [F]` are of the dropped nodes of all
    levels; `slope [D, D]` moves their values, if the far field is of second order.
    """

    kept: PlainRows | CodedRows
    pinned: PlainRows
    suffix: PlainRows
    far_logits: Tensor
    far_values: Tensor
    far_variance: Tensor
    slope: Tensor | None


def attend_units(
    rows: QueryRows, layer: ClusteredLayer, rule: SelectionRule, suffix: SuffixRows
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[H, U, R, D]` and log mass `[H, U, R]` float32, and the keys read, `[U]` int64."""
    found = walk(rows, layer, rule, in_kernel=False)
    output, log_mass = torch.empty_like(rows.queries), torch.empty(rows.queries.shape[:3])
    for head in range(output.shape[0]):
        for unit in range(rows.units):
            read = gather(head, unit, rows, layer, found, suffix, rule)
            mask = rows.mask[unit].repeat(rows.rows // rows.mask.shape[1], 1)
            for own in _turns(rows.rows, read):
                output[head, unit, own], log_mass[head, unit, own] = _attend(
                    rows.queries[head, unit, own], read, mask[own], read.far_logits[own]
                )
    return output, log_mass, torch.from_numpy(found.keys_read.sum(0))


def gather(
    head: int,
    unit: int,
    rows: QueryRows,
    layer: ClusteredLayer,
    found: Walk,
    suffix: SuffixRows,
    rule: SelectionRule,
) -> Gathered:
    """Copy what the unit reads, widened to float32."""
    batch, dim = int(rows.batch[unit]), layer.dim
    front = (x[head, : layer.pinned].float() for x in (layer.rows.keys, layer.rows.values))
    nothing = torch.empty(0, dim)
    kept: PlainRows | CodedRows = PlainRows(nothing, nothing)
    far = [(torch.empty(rows.rows, 0), nothing, torch.empty(0))]
    if layer.levels:
        kept = kept_rows(layer, head, torch.from_numpy(found.state[head, unit]).eq(int(KEPT)))
    energy = torch.from_numpy(found.far_energy)
    for level, state, logits in found.visited if rule.far_field != "none" else ():
        nodes = torch.from_numpy(state[head, unit]).eq(int(DROPPED)).nonzero()[:, 0]
        own = slice(unit * rows.rows, (unit + 1) * rows.rows)
        sizes = level.key_offsets[head].diff()[nodes]
        variance = level.variance[head, nodes]
        mass = torch.from_numpy(logits[head, own])[:, nodes] + sizes.log()
        mass += energy[head, own, None] * variance
        far.append((mass, level.mean_values[head, nodes].float(), variance))
    far_logits, far_values, far_variance = zip(*far, strict=True)
    dipole = rule.far_field == "second_order"
    return Gathered(
        kept=kept,
        pinned=PlainRows(*front),
        suffix=PlainRows(*(x[batch, head].float() for x in (suffix.key_rows, suffix.value_rows))),
        far_logits=torch.cat(far_logits, 1),
        far_values=torch.cat(far_values),
        far_variance=torch.cat(far_variance),
        slope=layer.value_slope[head].float() if dipole else None,
    )


def _turns(rows: int, read: Gathered) -> Iterator[slice]:
    step = max(1, MOST_LOGITS // max(1, len(read.kept) + len(read.pinned)))
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _attend(q: Tensor, read: Gathered, mask: Tensor, far_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log mass of `q [rows, D]`, already scaled. Overwrites the far field's logits."""
    recent = read.suffix.logits(q).masked_fill_(~mask, -torch.inf)
    parts: list[Part] = [(rows.logits(q), rows.weighted) for rows in (read.kept, read.pinned)]
    parts += [(recent, read.suffix.weighted), (far_logits, lambda w: w @ read.far_values)]
    output, mass, peak = _softmax_sum(parts)
    if read.slope is not None:
        output += (far_logits @ read.far_variance)[:, None] * (q @ read.slope.T)
    return output / mass.masked_fill(mass == 0, 1.0), (peak + mass.log())[:, 0]


def _softmax_sum(parts: list[Part]) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted values of all parts, the sum of weights, and its unit: the largest logit.

    Logits become weights.
    """
    peaks = [logits.amax(-1) for logits, _ in parts if logits.shape[1]]
    peak = torch.stack(peaks).amax(0) if peaks else parts[0][0].new_zeros(len(parts[0][0]))
    peak = peak.masked_fill(peak == -torch.inf, 0.0)[:, None]
    weights = [(logits.sub_(peak).exp_(), weighted) for logits, weighted in parts]
    mass = reduce(torch.add, (w.sum(-1, keepdim=True) for w, _ in weights))
    return reduce(torch.add, (weighted(w) for w, weighted in weights)), mass, peak
