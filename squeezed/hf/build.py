"""A method's view of a context -> the cache that Transformers gets."""

from __future__ import annotations

from collections.abc import Iterable

from squeezed.context.layers import WindowLayer
from squeezed.context.record import ContextRecord
from squeezed.hf.cache import SqueezedCache
from squeezed.hf.cache_layers import ContextLayer, WindowedLayer
from squeezed.hf.static import StaticContextLayer, StaticWindowedLayer
from squeezed.hf.suffix import SuffixLayer
from squeezed.methods.base import ContextAttention


def build_cache(
    context: ContextRecord,
    attentions: Iterable[ContextAttention],
    budget: float,
    suffix_tokens: int | None = None,
) -> SqueezedCache:
    """One cache layer per model layer; a buffer of `suffix_tokens` each, or growing if `None`.

    Args:
        attentions: a method's view of every layer with full attention.
    """
    views = iter(attentions)
    built = [
        _windowed(layer, suffix_tokens)
        if isinstance(layer, WindowLayer)
        else _full(next(views), suffix_tokens)
        for layer in context.layers
    ]
    return SqueezedCache(built, budget, context.tokens)


def _windowed(layer: WindowLayer, suffix_tokens: int | None) -> SuffixLayer:
    return (
        WindowedLayer(layer) if suffix_tokens is None else StaticWindowedLayer(layer, suffix_tokens)
    )


def _full(view: ContextAttention, suffix_tokens: int | None) -> SuffixLayer:
    return ContextLayer(view) if suffix_tokens is None else StaticContextLayer(view, suffix_tokens)
