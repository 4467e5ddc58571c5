"""A method's view of a context -> the cache that Transformers gets."""

from __future__ import annotations

from collections.abc import Iterable

from squeezed.context.layers import WindowLayer
from squeezed.context.record import ContextRecord
from squeezed.hf.cache import ContextLayer, SqueezedCache, WindowedLayer
from squeezed.hf.static import StaticContextLayer, StaticWindowedLayer
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
    seen = [layer if isinstance(layer, WindowLayer) else next(views) for layer in context.layers]
    windowed, full, arguments = WindowedLayer, ContextLayer, ()
    if suffix_tokens is not None:
        windowed, full, arguments = StaticWindowedLayer, StaticContextLayer, (suffix_tokens,)
    built = [
        (windowed if isinstance(layer, WindowLayer) else full)(layer, *arguments) for layer in seen
    ]
    return SqueezedCache(built, budget, context.tokens)
