"""A method's view of a context -> the cache that Transformers gets."""

from __future__ import annotations

from torch import Tensor

from squeezed.context.layers import WindowLayer
from squeezed.hf.cache import ContextLayer, SqueezedCache, WindowedLayer
from squeezed.hf.static import StaticContextLayer, StaticWindowedLayer
from squeezed.methods.base import ContextAttention


def build_cache(
    contexts: list[ContextAttention | WindowLayer],
    budget: float,
    document: Tensor,
    suffix_tokens: int | None = None,
) -> SqueezedCache:
    """One cache layer per model layer; a buffer of `suffix_tokens` each, or growing if `None`."""
    windowed, full, arguments = WindowedLayer, ContextLayer, ()
    if suffix_tokens is not None:
        windowed, full, arguments = StaticWindowedLayer, StaticContextLayer, (suffix_tokens,)
    built = [
        (windowed if isinstance(context, WindowLayer) else full)(context, *arguments)
        for context in contexts
    ]
    return SqueezedCache(built, budget, document)
