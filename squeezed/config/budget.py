"""How much a query reads, and writes."""

from __future__ import annotations

from numbers import Real

from squeezed.errors import SqueezedError, shares

DEFAULT_BUDGET = 0.1
"""Share of the context's clustered keys that a query reads exactly."""

DEFAULT_NEW_TOKENS = 128
"""Longest answer, in tokens, unless asked otherwise."""


def rising(name: str, values: tuple[float, ...]) -> tuple[float, ...]:
    """Increasing shares in (0, 1) as a tuple, or raise `SqueezedError`."""
    found = shares(name, values)
    if not found or any(not 0 < share < 1 for share in found):
        raise SqueezedError(f"{name}: expected shares in (0, 1), got {found}")
    if tuple(sorted(set(found))) != found:
        raise SqueezedError(f"{name}: expected increasing values, got {found}")
    return found


def check_budget(budget: float) -> float:
    """Return `budget` as a float in (0, 1], or raise `SqueezedError`."""
    if isinstance(budget, bool) or not isinstance(budget, Real) or not 0 < budget <= 1:
        raise SqueezedError(
            f"budget: expected a share of the context's keys in (0, 1], got {budget!r}; "
            "0.1 reads a tenth, 1.0 is dense attention"
        )
    return float(budget)
