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
from squeezed.context.record import ContextRecord
from squeezed.indexing.threads import each_in_a_thread

Context = TypeVar("Context", bound=ContextRecord)

LOSS_QUERIES = 32
"""Most queries of the probe, per query head, with which the loss is measured."""


def encode(
    layers: Sequence[ClusteredLayer],
    observed: Sequence[Tensor],
    rows: RowsName,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[ClusteredLayer], tuple[tuple[float, ...], ...]]:
    """Layers with rows in that encoding, and the loss of every head (`loss`).

    Args:
        layers: taken one after the other, each let go by who holds no other name for it.
        observed: `[Hq, W, D]` of a probe, per layer; empty if nobody kept them: then keys are not
            fitted to queries, and no loss is measured.
        progress: called with the number of layers done.

    Raises:
        SqueezedError: what `squeezed.context.encoding.encoded` refuses.
    """

    def one(place: int) -> tuple[ClusteredLayer, tuple[float, ...]]:
        layer, queries = layers[place], observed[place] if observed else None
        found = encoded(layer, rows, queries)
        return found, () if queries is None else tuple(loss(layer, found, queries).tolist())

    places = range(len(layers))
    on_cpu = bool(layers) and layers[0].device.type == "cpu"
    made, losses = [], []
    for found, lost in each_in_a_thread(one, places) if on_cpu else map(one, places):
        made.append(found)
        losses.append(lost)
        progress(len(made))
    return made, tuple(losses) if observed else ()


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


def with_rows(
    context: Context,
    rows: RowsName,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Context:
    """A context with its rows in that encoding; as it is if they are written so.

    Args:
        progress: called with the layers done, and with all there are.

    Raises:
        SqueezedError: rows in another encoding: what they were is lost.
    """
    if check_rows(rows) == context.rows:
        return context
    context.check_plain(f"an encoding as {rows!r}")
    started, layers = time.perf_counter(), context.clustered_layers
    made, losses = encode(layers, context.observed, rows, lambda done: progress(done, len(layers)))
    encoded_layers = iter(made)
    return replace(
        context,
        layers=tuple(
            next(encoded_layers) if isinstance(layer, ClusteredLayer) else layer
            for layer in context.layers
        ),
        config=replace(context.config, rows=rows),
        rows_loss=losses,
        seconds=context.seconds | {"encode": time.perf_counter() - started},
    )
