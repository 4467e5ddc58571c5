"""What a row read of its context: keys, bytes, and how its attention lay over the passages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from squeezed.answers.reading import rows_read
from squeezed.context.bytes import LayerBytes
from squeezed.context.encoding import wide
from squeezed.context.layers import ClusteredLayer
from squeezed.hf.fixed_context import FixedContext
from squeezed.hf.watched import WatchedLayer
from squeezed.methods.base import ContextAttention
from squeezed.server.local.rows import Row

QUERIES_AT_ONCE = 8
"""Query tokens scored together: memory is `Hq * 8 * P` floats."""

MOST_TOLD = 8
"""Passages told of every token: so many that it drew on most, and so many that stand out most."""

LEAST_USUAL = 0.02
"""Of the mean share: passages whose usual share is less count as if it were that."""


def bytes_read(
    context: FixedContext, views: Sequence[ContextAttention], row: Row, budget: float
) -> dict[str, int]:
    """Bytes of the context that a token of this request read on average, beside dense.

    Exact keys are counted at every token; what the index costs is measured at the tokens whose
    queries were kept.
    """
    exact = index = dense = 0.0
    tokens = max(1, row.passed)
    for place, view in enumerate(views):
        layer, queries = view.layer, row.queries.get(place, [])
        calls = max(1, _calls(row, place))
        size = LayerBytes.of(layer)
        exact += size.pinned(layer.pinned * layer.kv_heads * calls)
        dense += layer.kv_bytes() * calls
        if budget < 1 and queries:
            query = torch.cat(queries, 2)
            index += float(view.index_bytes(query)) / query.shape[2] * calls
    if views:
        exact += LayerBytes.of(views[0].layer).keys(row.read) / tokens
    windows = context.window_bytes()
    return {
        "exact": round(exact + windows),
        "index": round(index),
        "total": round(exact + windows + index),
        "dense": round(dense + windows),
    }


def _calls(row: Row, place: int) -> int:
    """How often a pass asks this layer: once, and again for every layer that shares its keys."""
    passes = min((len(kept) for kept in row.queries.values()), default=1)
    return len(row.queries.get(place, [])) // max(1, passes)


def attention_over(
    context: FixedContext,
    views: Sequence[ContextAttention],
    row: Row,
    bounds: Sequence[tuple[int, int]],
) -> tuple[Tensor, Tensor]:
    """Softmax mass that every token of an answer gave to every passage, `[N, passages]` float64,
    and the share of exact reads of each passage, `[passages]` float64.

    Attention is computed exactly, over all keys, whatever was read; the first tokens, its resting
    place, are left out, as in `squeezed.answers.sources`.
    """
    answered = len(row.answer)
    owner = torch.zeros(len(context.tokens), dtype=torch.long)  # 0: no passage
    for number, (start, end) in enumerate(bounds):
        owner[start:end] = number + 1
    owner[: context.config.clustering.pinned_first] = 0
    mass = torch.zeros(answered, len(bounds) + 1, dtype=torch.float64)
    read = torch.zeros(len(context.tokens), dtype=torch.float64)
    for place, view in enumerate(views):
        query = torch.cat(row.queries[place], 2)
        mass += _layer_mass(view.layer, query, owner, len(bounds), answered)
        share = rows_read(WatchedLayer(view, (query,), 0, 0, 0), query)
        if share is not None:
            read.scatter_add_(
                0, view.layer.positions.long().cpu().flatten(), share.double().cpu().flatten()
            )
    heads = sum(view.layer.kv_heads for view in views)
    parts = [read[start:end].mean() / heads for start, end in bounds]
    return mass[:, 1:], torch.stack(parts) if parts else read[:0]


def _layer_mass(
    layer: ClusteredLayer, query: Tensor, owner: Tensor, passages: int, answered: int
) -> Tensor:
    """One layer's part of `attention_over`, `[N, passages + 1]` float64."""
    heads = layer.kv_heads
    owners = owner.to(layer.device)[layer.positions.long()]  # [Hkv, P]
    keys = wide(layer, torch.float32)[0].mT
    found = []
    for part in query[0].float().unflatten(0, (heads, -1)).split(QUERIES_AT_ONCE, 2):
        weights = (layer.scale * part.flatten(1, 2) @ keys).softmax(-1)
        weights = weights.unflatten(1, part.shape[1:3]).sum(1)  # [Hkv, n, P], over the group
        own = weights.new_zeros(heads, part.shape[2], passages + 1)
        own.scatter_add_(2, owners[:, None].expand(-1, part.shape[2], -1), weights)
        found.append(own.sum(0).double().cpu())
    mass = torch.cat(found)  # several for a token, where layers share keys
    return mass.unflatten(0, (answered, -1)).sum(1)


def passages_told(
    places: Sequence[tuple[int, int]],
    found: tuple[Tensor, Tensor],
    usual: Tensor | None,
    row: Row,
) -> dict[str, Any]:
    """The `passages` of an answer, and its `tokens` if they are asked for.

    Args:
        places: of the passages in the text, in characters.
        found: as `attention_over` returns it.
        usual: shares that a neutral question's answer gives, `[passages]`.
    """
    mass, read = found
    shares = shares_of(mass)
    excess = shares - usual if usual is not None else shares
    data = [
        {"index": i, "start": place[0], "end": place[1], "share": _short(shares[i]),
         "excess": _short(excess[i]), "read": _short(read[i])}
        for i, place in enumerate(places)
    ]  # fmt: skip
    if not row.ask.per_token:
        return {"passages": data}
    return {"passages": data, "tokens": _tokens_told(mass, usual, row)}


def _tokens_told(mass: Tensor, usual: Tensor | None, row: Row) -> list[dict[str, Any]]:
    """Of every token: where it stands in the answer's text, and what it drew on.

    Heads look at what is near, so the end of a document is drawn on most by every token; what a
    word came from is drawn on less, and stands out from what a neutral question draws.
    """
    each = mass / mass.sum(1, keepdim=True).clamp(min=1e-30)
    most = min(MOST_TOLD, each.shape[1])
    stand = standing_out(each, torch.zeros_like(each[0]) if usual is None else usual)
    ends = [*row.offsets[1:], row.words.length]
    told = []
    for shares, stands, start, end in zip(each, stand, row.offsets, ends, strict=True):
        which = {*shares.topk(most).indices.tolist(), *stands.topk(most).indices.tolist()}
        drawn = sorted(([i, _short(shares[i])] for i in which), key=lambda one: -one[1])
        last = row.words.length
        told.append({"start": min(start, last), "end": min(end, last), "passages": drawn})
    return told


def standing_out(shares: Tensor, usual: Tensor) -> Tensor:
    """How far shares stand out from the usual ones, in the manner of Pearson's residuals."""
    least = LEAST_USUAL / max(1, len(usual))
    return (shares - usual) / usual.clamp(min=least).sqrt()


def shares_of(mass: Tensor) -> Tensor:
    """Share of an answer's attention to the document that each passage got, `[passages]`."""
    total = mass.sum(0)
    return total / total.sum().clamp(min=1e-30)


def _short(value: Tensor) -> float:
    return round(float(value), 6)
