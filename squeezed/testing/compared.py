"""An implementation of attention against the reference, with a tolerance that is derived."""

from __future__ import annotations

import torch
from torch import Tensor

from squeezed.attention import reference
from squeezed.attention.interface import Attended, Suffix
from squeezed.context.layers import ClusteredLayer
from squeezed.context.rule import SelectionRule


def assert_matches_reference(
    found: Attended,
    query: Tensor,
    layer: ClusteredLayer,
    rule: SelectionRule,
    suffix: Suffix | None = None,
    valid: Tensor | None = None,
    floor: float | None = None,
    mass_floor: float = 0.0,
) -> None:
    """`found` is what the reference finds, and reads the same keys.

    Its output may be away from the reference in float64 by twice what the reference in the query's
    precision is, its log mass likewise.

    Args:
        floor: what the output may be away besides, relative to its norm; half a rounding in the
            query's precision if `None`.
        mass_floor: what log masses may be away besides, in nats.
    """
    operands = (layer, rule, suffix, valid)
    exact = reference.attend(query.double(), *operands)
    rounded = reference.attend(query, *operands)
    assert found.output.dtype == query.dtype and found.output.shape == query.shape
    assert found.keys_read.tolist() == rounded.keys_read.tolist()
    floor = torch.finfo(query.dtype).eps / 2 if floor is None else floor
    own, away = ((x.output.double() - exact.output).norm() for x in (rounded, found))
    allowed = 2 * own + floor * exact.output.norm()
    assert away <= allowed, f"output: {float(away):.3g} away, {float(allowed):.3g} are allowed"
    assert_close_masses(found.log_mass, exact.log_mass, rounded.log_mass, mass_floor)


def assert_close_masses(found: Tensor, exact: Tensor, rounded: Tensor, floor: float = 0.0) -> None:
    """Within twice the reference's own error, and the rounding of sums in float32.

    Products of 16-bit numbers are exact; their sums, and those of weights, are float32.
    """
    finite = exact.isfinite()
    assert found.shape == exact.shape and found.isfinite().equal(finite)
    own, away = ((x.double() - exact)[finite].abs() for x in (rounded, found))
    rounding = 16 * torch.finfo(torch.float32).eps * (1 + exact[finite].abs())
    assert not len(own) or bool((away <= 2 * own.max() + rounding + floor).all())
