"""NaN and infinity in what a model computed for a document: refused before anything is built."""

from __future__ import annotations

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
    flags = [is_finite(tensor) for tensor, _, _, _ in parts]
    finite = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
    if all(finite):
        return
    tensor, what, text, first = parts[finite.index(False)]
    raise SqueezedError(
        f"model: {what} {_first_bad(tensor, first)} of {text}; load it in bfloat16 or float32, or "
        "check its weights"
    )


def check_layer(**tensors: Tensor | None) -> None:
    """The same for the tensors of one layer, `[heads, tokens, D]`, called by their names."""
    for name, tensor in tensors.items():
        if tensor is not None and not is_finite(tensor):
            raise SqueezedError(
                f"{name}: expected finite numbers, got {_first_bad(tensor, 0)}; leave such "
                "documents out, or compute them in bfloat16 or float32"
            )


Part = tuple[Tensor, str, str, int]


def _parts(place: int, layer: CapturedLayer, tokens: int) -> Iterator[Part]:
    """Every tensor of a layer, what it is, whose tokens it describes, and the first of them."""
    for name in ("keys", "values"):
        tensor = getattr(layer, name)
        first = tokens - tensor.shape[1]  # a sliding window holds the last ones
        yield tensor, f"the {name} of layer {place} hold", "the document", first
    if layer.queries is not None:
        yield layer.queries, f"the queries of layer {place} hold", "the calibrating question", 0


def is_finite(tensor: Tensor) -> Tensor:
    """Whether all elements are finite, a scalar; no copy of them is made."""
    if tensor.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    low, high = tensor.aminmax()  # NaN passes through
    return low.isfinite() & high.isfinite()


def _first_bad(tensor: Tensor, first: int) -> str:
    bad = ~tensor.isfinite()
    token = int(bad.any(-1).any(0).nonzero()[0, 0])
    kind = "NaN" if tensor[:, token].isnan().any() else "an infinity"
    return f"{kind} at token {first + token}"
