"""The decode step as an operator of PyTorch, so that `torch.compile` keeps it in one graph.

The operator takes a layer apart into tensors, since a graph can hold nothing else; `decode_step`
here has the signature that every implementation shares.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from squeezed.attention.interface import Attended, Suffix
from squeezed.attention.triton.decode import launch as decode
from squeezed.config import FarField
from squeezed.context.layers import ClusteredLayer, Level
from squeezed.context.rows import Codes, Rows
from squeezed.context.rule import SelectionRule


def decode_step(
    query: Tensor,
    layer: ClusteredLayer,
    rule: SelectionRule,
    suffix: Suffix | None = None,
    valid: Tensor | None = None,
) -> Attended:
    """`squeezed.attention.triton.decode.launch.decode_step`, as one node of a compiled graph."""
    levels = layer.levels
    own = (None, None, None) if suffix is None else (suffix.keys, suffix.values, suffix.mask)
    found = step_of_parts(
        query,
        layer.rows.keys,
        layer.rows.values,
        layer.rows.encoding,
        [] if layer.rows.codes is None else list(layer.rows.codes.named().values()),
        layer.positions,
        layer.value_slope,
        layer.centre,
        [level.centroids for level in levels],
        [level.mean_values for level in levels],
        [level.variance for level in levels],
        [level.key_offsets for level in levels],
        [level.child_offsets for level in levels if level.child_offsets is not None],
        *own,
        valid,
        rule.alpha,
        rule.far_alpha,
        rule.log_thresholds,
        rule.far_field,
        layer.pinned,
        layer.scale,
    )
    return Attended(*found)


@torch.library.custom_op("squeezed::decode_step", mutates_args=())
def step_of_parts(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    encoding: str,
    codes: list[Tensor],
    positions: Tensor,
    value_slope: Tensor,
    centre: Tensor,
    centroids: list[Tensor],
    mean_values: list[Tensor],
    variance: list[Tensor],
    key_offsets: list[Tensor],
    child_offsets: list[Tensor],
    suffix_keys: Tensor | None,
    suffix_values: Tensor | None,
    suffix_mask: Tensor | None,
    valid: Tensor | None,
    alpha: Tensor | None,
    far_alpha: Tensor | None,
    log_thresholds: Tensor,
    far_field: str,
    pinned: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """A decode step over the parts of a layer and its rule; levels run from coarse to fine."""
    children = [*child_offsets, None] if centroids else []
    columns = (centroids, mean_values, variance, key_offsets, children)
    levels = tuple(Level(*parts) for parts in zip(*columns, strict=True))
    rows = Rows(keys, values, encoding, Codes(*codes) if codes else None)
    layer = ClusteredLayer(rows, positions, pinned, levels, value_slope, centre, scale)
    kind = cast(FarField, far_field)  # an operator takes no literal
    rule = SelectionRule(log_thresholds, alpha, kind, far_alpha=far_alpha)
    suffix = None
    if suffix_keys is not None and suffix_values is not None:
        suffix = Suffix(suffix_keys, suffix_values, suffix_mask)
    output, log_mass, keys_read = decode.decode_step(query, layer, rule, suffix, valid)
    return output, log_mass, keys_read


@step_of_parts.register_fake
def _(query: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    log_mass = query.new_empty(query.shape[:3], dtype=torch.float32)
    return torch.empty_like(query), log_mass, query.new_empty(len(query), dtype=torch.int64)
