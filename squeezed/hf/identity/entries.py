"""One weight's line in a fingerprint, and whether two lines are of one weight."""

from __future__ import annotations

import base64
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from squeezed.hf.identity.sketch import BASE, PROJECTIONS, ROUNDINGS, Sketch, sketch, type_name
from squeezed.hf.identity.state import state
from squeezed.hf.identity.weights import ADAPTED, MEASURED, PACKED, Part, added

CACHED = 1 << 16
"""Elements from which a weight is sketched again only if something says that it changed."""

EXACT, ROUNDED = "exact", "rounded"


def sameness(one: list, other: list) -> str | None:
    """`EXACT` for equal weights, `ROUNDED` for equal ones stored otherwise, else `None`."""
    kinds, types = {one[0], other[0]}, {one[1], other[1]}
    if PACKED in kinds and len(kinds) > 1:
        return ROUNDED  # only one side is quantised: behaviour decides
    mine, its = _sketch_of(one), _sketch_of(other)
    if mine.equals(its):
        return EXACT
    if mine.rounds_to(its):
        return ROUNDED
    # where rounding to 16 bits may part equal weights in a way that no sketch foresaw
    unforeseen = len(kinds) > 1 or MEASURED in kinds or (ADAPTED in kinds and len(types) > 1)
    if not unforeseen or types.isdisjoint(("bfloat16", "float16")):
        return None
    if mine.adds_to(its) or its.adds_to(mine):
        return None
    slack = 3 if MEASURED in kinds else 1  # products were rounded too, twice
    return ROUNDED if mine.is_near(its, slack) else None


def entry_of(part: Part, known: list | None) -> list:
    """`[kind, dtype, rows, own, rounded]`; roundings only where `known` is met by nothing else."""
    assert part.tensor is not None
    rows = len(part.tensor) if part.tensor.dim() else 1
    if known is None:
        return _written(part, rows, True)
    longer = isinstance(part.owner, nn.Embedding) and rows > known[2] > 0
    entry = _written(part, rows, False, known[2] if longer else None)
    if sameness(entry, known):
        return entry
    return _written(part, rows, True, known[2] if longer else None)


def _written(part: Part, rows: int, rounded: bool, first_rows: int | None = None) -> list:
    made = sketched(part, rounded, first_rows)
    own = np.append(made.buckets.ravel(), made.norm)
    return [part.kind, made.dtype, rows, text_of(own), text_of(*made.rounded.values())]


def _sketch_of(entry: list) -> Sketch:
    kind, dtype, _, own, rounded = entry
    roundings = map(type_name, ROUNDINGS.get(getattr(torch, dtype), ()))
    names = [BASE] if kind in (ADAPTED, MEASURED) else roundings
    *buckets, norm = numbers_of(own)
    return Sketch(
        dtype=dtype,
        buckets=np.reshape(buckets, (PROJECTIONS, -1)),
        rounded=dict(zip(names, numbers_of(rounded).reshape(-1, PROJECTIONS), strict=False)),
        norm=float(norm),
    )


def text_of(*arrays: np.ndarray) -> str:
    """Numbers as text, in float32."""
    joined = np.concatenate([array.ravel() for array in arrays] or [np.empty(0)])
    return base64.b64encode(joined.astype("<f4").tobytes()).decode()


def numbers_of(text: str) -> np.ndarray:
    """The numbers of `text_of`, `[n]` float32."""
    return np.frombuffer(base64.b64decode(text), "<f4")


_sketched: WeakKeyDictionary = WeakKeyDictionary()


@torch.no_grad()
def sketched(part: Part, rounded: bool, rows: int | None = None) -> Sketch:
    """The sketch of a part, or of its first `rows` rows; large ones are kept while unchanged."""
    assert part.tensor is not None
    wanted = (state(part), rounded, rows) if part.tensor.numel() >= CACHED else None
    kept = _sketched.setdefault(part.owner, {})
    if wanted and kept.get((part.key, rounded), (None,))[0] == wanted:
        return kept[part.key, rounded][1]
    tensor = part.tensor if rows is None else part.tensor[:rows]
    made = sketch(
        tensor,
        ROUNDINGS.get(tensor.dtype, ()) if rounded and not part.adapters else (),
        logarithm=part.key.endswith("inv_freq"),
        change=added(part) if rows is None else None,
    )
    kept[part.key, rounded] = (wanted, made)
    return made
