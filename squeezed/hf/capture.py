"""Document -> post-rotary keys and values of every layer, and the queries that calibrate.

The model itself prefills the document, in chunks, through a cache whose layers keep what they see;
then it reads a probe, a question-like text after the document, of which only the queries stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from squeezed.context.captured import CapturedLayer
from squeezed.hf.attention import Handover
from squeezed.hf.rope import first_chunk
from squeezed.hf.support import input_device, layer_kinds, text_config
from squeezed.hf.switch import using_attention


class CaptureLayer(CacheLayerMixin):
    """A full-attention layer that writes into a buffer for the document and the probe after it."""

    is_sliding = False

    def __init__(self, tokens: int, probe: int) -> None:
        super().__init__()
        self.tokens, self.capacity, self.filled = tokens, tokens + probe, 0
        self.queries: list[Tensor] = []
        self.scales: set[float] = set()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        dtype = min(value_states.dtype, torch.float32, key=lambda each: each.itemsize)
        self.keys, self.values = (
            x.new_empty(*x.shape[:2], self.capacity, x.shape[-1], dtype=dtype)
            for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.filled + key_states.shape[-2]  # copies take the buffers' dtype
        self.keys[:, :, self.filled : end] = key_states
        self.values[:, :, self.filled : end] = value_states
        self.filled = end
        handover = Handover(self.answer, self.keys.dtype)
        return handover, handover

    def answer(self, query: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Dense causal attention of one chunk; the queries of the last, the probe, are kept."""
        rows, end = query.shape[2], self.filled
        if end > self.tokens:
            self.queries.append(query[0].clone())
        self.scales.add(scale)
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        group = query.shape[1] // keys.shape[1]
        if group > 1:
            keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
        bias = causal_lower_right(rows, end) if rows > 1 else None
        return scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=scale)

    def captured(self) -> CapturedLayer:
        keys, values = self.keys[0, :, : self.tokens], self.values[0, :, : self.tokens]
        return CapturedLayer(keys, values, torch.cat(self.queries, 1), max(self.scales))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self.filled  # the mask goes unused: keep it small

    def get_seq_length(self) -> int:
        return self.filled

    def get_max_length(self) -> int:
        return self.capacity


@torch.inference_mode()
def capture(
    model: PreTrainedModel,
    tokens: Tensor,
    probe: Tensor,
    chunk: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[CapturedLayer]:
    """Prefill `tokens` `[P]` in chunks and return what every layer saw.

    Args:
        model: a causal language model; its attention implementation is restored afterwards.
        probe: `[W]` ids after the document, whose queries are kept and whose keys are not.
        chunk: tokens per forward pass; peak memory is the keys and values plus one chunk. The first
            may be longer, where rotary frequencies depend on the length.
        progress: called with the number of tokens done.
    """
    kinds = layer_kinds(model)
    count = tokens.shape[0]
    layers = [
        DynamicSlidingWindowLayer(kind.sliding_window)
        if kind.sliding_window
        else CaptureLayer(count, probe.shape[0])
        for kind in kinds
    ]
    cache, device = Cache(layers=layers), input_device(model)

    def read(part: Tensor) -> None:
        part = part[None].to(device)
        model.base_model(input_ids=part, past_key_values=cache, use_cache=True)

    with using_attention(model):
        done = 0
        while done < count:
            rows = chunk if done else max(chunk, first_chunk(text_config(model), count))
            read(tokens[done : done + rows])
            done = min(done + rows, count)
            progress(done)
        windows = {  # the probe would slide them on
            place: CapturedLayer(layer.keys[0].clone(), layer.values[0].clone(), None, 0.0)
            for place, layer in enumerate(layers)
            if not isinstance(layer, CaptureLayer)
        }
        read(probe)
    return [
        layer.captured() if isinstance(layer, CaptureLayer) else windows[place]
        for place, layer in enumerate(layers)
    ]
