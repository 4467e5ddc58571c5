"""Clustered layers -> the same with encoded rows, and what that costs in error."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from squeezed.config import RowsName, check_rows
from squeezed.context.encoding import encoded, wide
from squeezed.context.layers import ClusteredLayer
from squeezed.context.record import ContextRecord, Layer
from squeezed.indexing.threads import each_in_a_thread

Context = TypeVar("Context", bound=ContextRecord)
Progress = Callable[[int, int], None]

LOSS_QUERIES = 32
"""Most queries of the probe, per query head, with which the loss is measured."""


def silent(done: int, total: int) -> None:
    pass


def encode(
    layers: list[Layer],
    observed: Sequence[Tensor],
    rows: RowsName,
    progress: Progress = silent,
) -> tuple[tuple[float, ...], ...]:
    """Put layers with rows in that encoding in the place of those with plain ones.

    Args:
        layers: windows stay. Each is let go when it is encoded, if nobody else holds it.
        observed: `[Hq, W, D]` of a probe, per layer that is no window; empty if nobody kept them:
            then keys are not fitted to queries, and no loss is measured.
        progress: called with the layers done, and with all there are.

    Returns:
        The loss of every head of those layers (`loss`).

    Raises:
        SqueezedError: what `squeezed.context.encoding.encoded` refuses.
    """
    full = [place for place, layer in enumerate(layers) if isinstance(layer, ClusteredLayer)]

    def one(number: int) -> tuple[float, ...]:
        layer, queries = layers[full[number]], observed[number] if observed else None
        assert isinstance(layer, ClusteredLayer)
        with torch.autocast(layer.device.type, enabled=False):
            found = encoded(layer, rows, queries)
            layers[full[number]] = found
            return () if queries is None else tuple(loss(layer, found, queries).tolist())

    numbers, losses = range(len(full)), []
    devices = {layer.device.type for layer in layers if isinstance(layer, ClusteredLayer)}
    for lost in each_in_a_thread(one, numbers) if devices == {"cpu"} else map(one, numbers):
        losses.append(lost)
        progress(len(losses), len(full))
    return tuple(losses) if observed else ()


def loss(layer: ClusteredLayer, written: ClusteredLayer, queries: Tensor) -> Tensor:
    """How far encoded rows move the output of dense attention, `[Hkv]` float64.

    Root mean square over queries, relative to the output's own.

    Args:
        queries: `[Hq, W, D]`.
    """
    if written.rows.codes is None:
        return torch.zeros(layer.kv_heads, dtype=torch.float64)
    step = max(1, queries.shape[1] // LOSS_QUERIES)
    grouped = queries[:, ::step].float().unflatten(0, (layer.kv_heads, -1)).flatten(1, 2)
    found = []
    for head, query in enumerate(grouped):
        own = slice(head, head + 1)
        exact, away = (_dense(x.of_heads(own), query) for x in (layer, written))
        found.append((away - exact).double().norm() / exact.double().norm().clamp(min=1e-300))
    return torch.stack(found).cpu()


def _dense(layer: ClusteredLayer, query: Tensor) -> Tensor:
    """Output of one head's queries `[n, D]` over the context, `[n, D]` float32."""
    keys, values = (x[0] for x in wide(layer, torch.float32))
    return (layer.scale * query @ keys.T).softmax(-1) @ values


def with_rows(context: Context, rows: RowsName, progress: Progress = silent) -> Context:
    """A context with its rows in that encoding; as it is if they are written so.

    Raises:
        SqueezedError: rows in another encoding: what they were is lost.
    """
    if check_rows(rows) == context.rows:
        return context
    context.check_plain(f"an encoding as {rows!r}")
    started, layers = time.perf_counter(), list(context.layers)
    losses = encode(layers, context.observed, rows, progress)
    return replace(
        context,
        layers=tuple(layers),
        config=replace(context.config, rows=rows),
        rows_loss=losses,
        seconds=context.seconds | {"encode": time.perf_counter() - started},
    )
