"""Many rows per unit: gather the kept keys once per unit and head, leave the rest to products.

Selection is the same Numba kernel as in decode, fed with the logits of one batched product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from squeezed.config import SELF_CALIBRATION_CLAMP
from squeezed.ops.cpu.arrays import Suffix
from squeezed.ops.cpu.lookup import DROPPED, KEPT
from squeezed.ops.cpu.rows import QueryRows
from squeezed.ops.cpu.walk import Walk, walk
from squeezed.rule import SelectionRule
from squeezed.tree import ClusteredLayer

MOST_LOGITS = 1 << 23  # of one product; more rows are worked on in turns

Part = tuple[Tensor, Tensor]
"""Logits `[rows, n]` and values `[n, D]`, float32."""


@dataclass(frozen=True)
class Gathered:
    """What one unit of one head reads: keys and values `[n, D]` float32, kept and pinned apart.

    `far_logits [R, F]` and `far_values [F, D]` stand for the dropped nodes of all levels.
    """

    kept: Part
    pinned: Part
    suffix: Part
    far_logits: Tensor
    far_values: Tensor


def attend_units(
    rows: QueryRows, layer: ClusteredLayer, rule: SelectionRule, suffix: Suffix
) -> tuple[Tensor, Tensor]:
    """Output `[H, U, R, D]` float32, and the clustered keys that every unit reads, `[U]` int64."""
    found = walk(rows, layer, rule, in_kernel=False)
    estimate = torch.from_numpy(found.estimate).view(rows.queries.shape[:3])
    calibrated = rule.far_field == "self_calibrated" and bool(layer.levels)
    output = torch.empty_like(rows.queries)
    for head in range(output.shape[0]):
        for unit in range(rows.units):
            read = gather(head, unit, rows, layer, found, suffix, rule.far_field != "none")
            mask = rows.mask[unit].repeat(rows.rows // rows.mask.shape[1], 1)
            for own in _turns(rows.rows, read):
                output[head, unit, own] = _attend(
                    rows.queries[head, unit, own], read, mask[own], read.far_logits[own],
                    estimate[head, unit, own] if calibrated else None,
                )  # fmt: skip
    return output, torch.from_numpy(found.keys_read.sum(0))


def gather(
    head: int, unit: int, rows: QueryRows, layer: ClusteredLayer, found: Walk, suffix: Suffix,
    with_far: bool,
) -> Gathered:  # fmt: skip
    """Copy what the unit reads, widened to float32."""
    keys, values = layer.keys[head], layer.values[head]
    pinned = layer.pinned if layer.levels else layer.tokens
    batch, dim = int(rows.batch[unit]), keys.shape[1]
    kept = torch.empty(0, dtype=torch.int64)
    far: list[Part] = [(torch.empty(rows.rows, 0), torch.empty(0, dim))]
    if layer.levels:
        leaves = torch.from_numpy(found.state[head, unit]) == KEPT
        owned = leaves.repeat_interleave(layer.levels[-1].key_offsets[head].diff())
        kept = owned.nonzero()[:, 0] + pinned
    for level, state, logits in found.visited if with_far else ():
        nodes = (torch.from_numpy(state[head, unit]) == DROPPED).nonzero()[:, 0]
        own = slice(unit * rows.rows, (unit + 1) * rows.rows)
        sizes = level.key_offsets[head].diff()[nodes]
        mass = torch.from_numpy(logits[head, own])[:, nodes] + sizes.log()
        far.append((mass, level.mean_values[head, nodes].float()))
    return Gathered(
        kept=(keys[kept].float(), values[kept].float()),
        pinned=(keys[:pinned].float(), values[:pinned].float()),
        suffix=(suffix.key_rows[batch, head].float(), suffix.value_rows[batch, head].float()),
        far_logits=torch.cat([logits for logits, _ in far], 1),
        far_values=torch.cat([mean for _, mean in far], 0),
    )


def _turns(rows: int, read: Gathered) -> Iterator[slice]:
    step = max(1, MOST_LOGITS // max(1, len(read.kept[0]) + len(read.pinned[0])))
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _attend(
    q: Tensor, read: Gathered, mask: Tensor, far_logits: Tensor, estimate: Tensor | None
) -> Tensor:
    """`q [rows, D]`, already scaled; `estimate [rows]` asks for the far field to be rescaled."""
    parts = [(q @ keys.T, values) for keys, values in (read.kept, read.pinned)]
    if estimate is not None:
        gap = (parts[0][0].logsumexp(-1) - estimate).nan_to_num(0.0, 0.0, 0.0)
        gap = gap.clamp(-SELF_CALIBRATION_CLAMP, SELF_CALIBRATION_CLAMP)
        far_logits = far_logits + gap[:, None]
    recent = (q @ read.suffix[0].T).masked_fill_(~mask, -torch.inf)
    return _softmax_sum([*parts, (recent, read.suffix[1]), (far_logits, read.far_values)])


def _softmax_sum(parts: list[Part]) -> Tensor:
    """One softmax over all parts; rows without a key become 0. Overwrites the logits."""
    parts = [part for part in parts if part[0].shape[1]]
    if not parts:
        raise AssertionError("a context holds at least one key")
    top = torch.stack([logits.amax(-1) for logits, _ in parts]).amax(0)
    top = top.masked_fill(top == -torch.inf, 0.0)[:, None]
    weights = [(logits.sub_(top).exp_(), values) for logits, values in parts]
    mass = sum(w.sum(-1, keepdim=True) for w, _ in weights)
    output = sum(w @ values for w, values in weights)
    return output / mass.masked_fill(mass == 0, 1.0)
