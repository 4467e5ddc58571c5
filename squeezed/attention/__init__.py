"""Arithmetic behind one signature. This file alone validates and chooses an implementation.

Every implementation is a package with the same `attend`; none imports another (except that all are
tested against `reference`), and a named one never falls back to another.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from squeezed.errors import SqueezedError

IMPLEMENTATIONS = {
    "reference": "squeezed.attention.reference",
    "cpu": "squeezed.attention.cpu",
    "triton": "squeezed.attention.triton",
}

log = logging.getLogger("squeezed")


@cache
def choose(implementation: str, device: torch.device) -> str:
    """Name of the implementation that runs on `device`; `auto` logs what it chose and why."""
    if implementation == "auto":
        chosen = {"cuda": "triton", "cpu": "cpu"}.get(device.type, "reference")
        log.info("implementation auto: %s, because the context is on %s", chosen, device)
        return chosen
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(["auto", *IMPLEMENTATIONS])
        raise SqueezedError(f"implementation: expected one of {known}, got {implementation!r}")
    if implementation == "cpu" and device.type != "cpu":
        raise SqueezedError(
            f"implementation: 'cpu' cannot read a context on {device}; use 'triton' or 'auto'"
        )
    if implementation == "triton" and device.type != "cuda":
        raise SqueezedError(
            f"implementation: 'triton' needs a context on a GPU, got {device}; use 'auto' or 'cpu'"
        )
    return implementation


def implementation(name: str, device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    """The `attend` of an implementation, by name or `auto`, for a context on `device`.

    `squeezed.attention.reference.attend` says what it takes and returns.

    Raises:
        SqueezedError: an unknown name, or one that cannot run on `device`.
    """
    chosen = choose(name, device)
    try:
        attend = importlib.import_module(IMPLEMENTATIONS[chosen]).attend
    except ModuleNotFoundError as error:
        raise SqueezedError(
            f"implementation: {chosen!r} needs the package {error.name}, found none; install it, or"
            " use 'reference'"
        ) from error
    except SqueezedError:
        raise
    except (ValueError, RuntimeError) as error:  # Numba reads its settings when it is imported
        raise SqueezedError(
            f"implementation: {chosen!r} does not start ({error}); check the variables NUMBA_* of "
            "the environment, or use 'reference'"
        ) from error
    return _outside_graphs(attend) if chosen == "cpu" else attend


@cache
def _outside_graphs(attend: Callable) -> Callable:
    """Numba's code is no concern of `torch.compile`: a compiled model calls it between graphs."""
    return torch.compiler.disable(attend)
