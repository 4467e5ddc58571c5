"""Document -> post-rotary keys and values of every layer, and the queries that calibrate.

The model itself prefills the document, in chunks, through a cache whose layers keep what they see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from squeezed.hf.attention import Handover
from squeezed.hf.support import LayerKind, layer_kinds, using_attention


@dataclass(frozen=True)
class CapturedLayer:
    """One layer of a prefilled document.

    Attributes:
        keys, values: `[Hkv, P, D]` in document order (`[Hkv, W, D]` for a sliding window).
        queries: `[Hq, W, D]`, the observation window; `None` for a sliding window.
        scale: the layer's softmax scale.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor | None
    scale: float


class CaptureLayer(CacheLayerMixin):
    """A full-attention layer that writes into a buffer of the document's length."""

    is_sliding = False

    def __init__(self, tokens: int, observed: int) -> None:
        super().__init__()
        self.tokens, self.observed, self.filled = tokens, observed, 0
        self.queries: list[Tensor] = []
        self.scale = 0.0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = key_states.new_empty(*key_states.shape[:2], self.tokens, key_states.shape[-1])
        self.values = value_states.new_empty(
            *value_states.shape[:2], self.tokens, value_states.shape[-1]
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.filled + key_states.shape[-2]
        self.keys[:, :, self.filled : end] = key_states
        self.values[:, :, self.filled : end] = value_states
        self.filled = end
        handover = Handover(self.attend)
        return handover, handover

    def attend(self, query: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Dense causal attention of one chunk; keeps its queries if they are among the last."""
        rows, end = query.shape[2], self.filled
        wanted = end - (self.tokens - self.observed)
        if wanted > 0:
            self.queries.append(query[0, :, -wanted:].clone())
        self.scale = scale
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        group = query.shape[1] // keys.shape[1]
        if group > 1:
            keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
        bias = causal_lower_right(rows, end) if rows > 1 else None
        return scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=scale)

    def captured(self) -> CapturedLayer:
        queries = torch.cat(self.queries, 1)
        return CapturedLayer(self.keys[0], self.values[0], queries, self.scale)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self.filled  # the mask goes unused: keep it small

    def get_seq_length(self) -> int:
        return self.filled

    def get_max_length(self) -> int:
        return self.tokens


@torch.inference_mode()
def capture(
    model,
    tokens: Tensor,
    observed: int,
    chunk: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[CapturedLayer]:
    """Prefill `tokens` `[P]` in chunks and return what every layer saw.

    Args:
        model: a causal language model; its attention implementation is restored afterwards.
        observed: how many of the last queries to keep.
        chunk: tokens per forward pass; peak memory is the keys and values plus one chunk.
        progress: called with the number of tokens done.
    """
    kinds = layer_kinds(model)
    count = tokens.shape[0]
    layers = [
        DynamicSlidingWindowLayer(kind.sliding_window)
        if kind.sliding_window
        else CaptureLayer(count, min(observed, count))
        for kind in kinds
    ]
    cache = Cache(layers=layers)
    with using_attention(model):
        for start in range(0, count, chunk):
            part = tokens[None, start : start + chunk].to(model.device)
            model.base_model(input_ids=part, past_key_values=cache, use_cache=True)
            progress(min(start + chunk, count))
    return [_captured(layer, kind) for layer, kind in zip(layers, kinds, strict=True)]


def _captured(layer: CacheLayerMixin, kind: LayerKind) -> CapturedLayer:
    if isinstance(layer, CaptureLayer):
        return layer.captured()
    return CapturedLayer(layer.keys[0].clone(), layer.values[0].clone(), None, 0.0)
