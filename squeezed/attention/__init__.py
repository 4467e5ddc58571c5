"""Arithmetic behind one signature. This file alone validates and chooses an implementation.

Every implementation is a package with the same `attend(query, layer, rule, suffix, valid)`; none
imports another (except that all are tested against `reference`), and a named one never falls back.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from squeezed.attention.interface import Attended, Suffix, merge
from squeezed.context.layers import ClusteredLayer
from squeezed.context.rule import SelectionRule
from squeezed.errors import SqueezedError

__all__ = ["IMPLEMENTATIONS", "Attended", "Suffix", "attend", "choose", "implementation", "merge"]

IMPLEMENTATIONS = {
    "reference": "squeezed.attention.reference",
    "cpu": "squeezed.attention.cpu",
    "triton": "squeezed.attention.triton",
}

log = logging.getLogger("squeezed")


def check_name(implementation: str) -> None:
    """Raise `SqueezedError` for a name that no implementation has."""
    known = ["auto", *IMPLEMENTATIONS]
    if implementation not in known:
        raise SqueezedError(
            f"implementation: expected one of {', '.join(known)}, got {implementation!r}"
        )


@cache
def choose(implementation: str, device: torch.device) -> str:
    """Name of the implementation that runs on `device`; `auto` logs what it chose and why."""
    check_name(implementation)
    if implementation == "auto":
        chosen = {"cuda": "triton", "cpu": "cpu"}.get(device.type, "reference")
        log.info("implementation auto: %s, because the context is on %s", chosen, device)
        return chosen
    if implementation == "cpu" and device.type != "cpu":
        raise SqueezedError(
            f"implementation: 'cpu' cannot read a context on {device}; use 'triton' or 'auto'"
        )
    if implementation == "triton" and device.type != "cuda":
        raise SqueezedError(
            f"implementation: 'triton' needs a context on a GPU, got {device}; use 'auto' or 'cpu'"
        )
    return implementation


def attend(
    query: Tensor,
    layer: ClusteredLayer,
    rule: SelectionRule,
    suffix: Suffix | None = None,
    valid: Tensor | None = None,
    implementation: str = "auto",
) -> Attended:
    """Squeezed attention by the implementation that runs where the layer is.

    Args:
        query: `[B, Hq, Q, D]`, after rotary embedding, in the dtype of the layer's keys.
        layer, rule: of the context.
        suffix: each request's own tokens; `None` attends to the context alone.
        valid: `[B, Q]` bool, False for padding; `None` if no query is.
        implementation: `auto`, `reference`, `cpu` or `triton`; a named one never falls back.

    Raises:
        SqueezedError: shapes that do not fit each other, or an implementation that cannot run.
    """
    check(query, layer, suffix, valid)
    return _port(choose(implementation, layer.device))(query, layer, rule, suffix, valid)


def check(
    query: Tensor, layer: ClusteredLayer, suffix: Suffix | None, valid: Tensor | None
) -> None:
    """Raise `SqueezedError` unless the shapes fit: kernels read as many rows as they are told."""
    kv_heads, dim = layer.kv_heads, layer.dim
    if query.ndim != 4 or query.shape[1] % kv_heads or query.shape[3] != dim:
        raise SqueezedError(
            f"query: expected [B, Hq, Q, {dim}] with Hq a multiple of {kv_heads}, got "
            f"{list(query.shape)}; index the document with this model"
        )
    batch, _, rows, _ = query.shape
    if valid is not None and (valid.shape != (batch, rows) or valid.dtype != torch.bool):
        raise SqueezedError(
            f"valid: expected bool [{batch}, {rows}], True where a query is no padding, got "
            f"{valid.dtype} {list(valid.shape)}"
        )
    if suffix is None:
        return
    shape = (batch, kv_heads, suffix.tokens, dim)
    for name, rows_of in (("suffix.keys", suffix.keys), ("suffix.values", suffix.values)):
        if tuple(rows_of.shape) != shape:
            raise SqueezedError(
                f"{name}: expected {list(shape)}, got {list(rows_of.shape)}; give one row per token"
            )
    mask = suffix.mask
    if mask is not None and (
        mask.dtype != torch.bool
        or mask.ndim != 4
        or mask.shape[0] not in (1, batch)
        or mask.shape[1:] != (1, rows, suffix.tokens)
    ):
        raise SqueezedError(
            f"suffix.mask: expected bool [{batch}, 1, {rows}, {suffix.tokens}], got {mask.dtype} "
            f"{list(mask.shape)}; None is causal"
        )


def implementation(name: str, device: torch.device) -> Callable[..., Attended]:
    """The `attend` of an implementation, by name or `auto`, for a context on `device`.

    `squeezed.attention.reference.attend` says what it takes and returns; it checks no shapes.

    Raises:
        SqueezedError: an unknown name, or one that cannot run on `device`.
    """
    return _port(choose(name, device))


def _port(chosen: str) -> Callable[..., Attended]:
    try:
        port = importlib.import_module(IMPLEMENTATIONS[chosen]).attend
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
    return _outside_graphs(port) if chosen == "cpu" else port


@cache
def _outside_graphs(port: Callable) -> Callable:
    """Numba's code is no concern of `torch.compile`: a compiled model calls it between graphs."""
    return torch.compiler.disable(port)
