"""NaN, infinity and what cannot be squared in what a model computed for a document: refused before
anything is built.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from squeezed.errors import SqueezedError

if TYPE_CHECKING:
    from squeezed.context.captured import CapturedLayer


def check_captured(captured: Iterable[CapturedLayer], tokens: int) -> None:
    """Raise `SqueezedError` that names the first layer and position with a NaN or infinity.

    A GPU is waited for once, for all layers.
    """
    parts = [part for place, layer in enumerate(captured) for part in _parts(place, layer, tokens)]
    flags = [is_finite(tensor, LARGEST[name]) for name, tensor, _, _ in parts]
    finite = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
    if all(finite):
        return
    name, tensor, what, first = parts[finite.index(False)]
    raise SqueezedError(
        f"model: {what.format(_first_bad(tensor, first, LARGEST[name]))}; load it in bfloat16 or "
        "float32, or check its weights"
    )


def check_layer(**tensors: Tensor | None) -> None:
    """The same for the tensors of one layer, `[heads, tokens, D]`, called by their names."""
    for name, tensor in tensors.items():
        if tensor is not None and not is_finite(tensor, LARGEST[name]):
            raise SqueezedError(
                f"{name}: expected numbers to {LARGEST[name]:g}, got "
                f"{_first_bad(tensor, 0, LARGEST[name])}; leave such documents out, or compute them"
                " in bfloat16 or float32"
            )


LARGEST = {"keys": 1e8, "queries": 1e8, "values": 1e16}
"""Beyond these the square of a logit, or of a value, may pass float32; models stay below 1e5."""

Part = tuple[str, Tensor, str, int]


def _parts(place: int, layer: CapturedLayer, tokens: int) -> Iterator[Part]:
    """Every tensor of a layer, called by its name, what is wrong with it if something is, and the
    first of the tokens that it describes."""
    for name in ("keys", "values"):
        tensor = getattr(layer, name)
        first = tokens - tensor.shape[1]  # a sliding window holds the last ones
        yield name, tensor, f"the {name} of layer {place} hold {{}} of the document", first
    if layer.queries is not None:
        what = f"the queries of layer {place} hold {{}} of the calibrating question"
        yield "queries", layer.queries, what, 0


def is_finite(tensor: Tensor, most: float = math.inf) -> Tensor:
    """Whether all elements are finite and within `most` of 0, a scalar; no copy of them is made."""
    if tensor.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    most = min(most, torch.finfo(tensor.dtype).max)
    low, high = tensor.aminmax()  # NaN passes through, and is not within anything
    return (low >= -most) & (high <= most)


def _first_bad(tensor: Tensor, first: int, most: float) -> str:
    bad = ~(tensor.double().abs() <= most)
    token = int(bad.any(-1).any(0).nonzero()[0, 0])
    found = tensor[:, token]
    if found.isnan().any():
        kind = "NaN"
    else:
        largest = float(found.abs().max())
        kind = "an infinity" if math.isinf(largest) else f"{largest:.2g}, too large to square,"
    return f"{kind} at token {first + token}"
