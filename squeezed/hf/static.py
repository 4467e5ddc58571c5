"""Cache layers whose suffix is a buffer of fixed size: `generate()` compiles the decode step.

Transformers compiles the forward pass, with CUDA graphs, when every layer of a cache says that it
is compileable. Nothing here may depend on values: the number of tokens so far is a tensor, and what
the graph reads keeps its address.
"""

from __future__ import annotations

import torch
from torch import Tensor

from squeezed.errors import SqueezedError
from squeezed.hf.cache import ContextLayer, SuffixLayer, WindowedLayer
from squeezed.methods.base import ContextAttention
from squeezed.tree import WindowLayer


class StaticSuffix(SuffixLayer):
    """Keys and values `[B, Hkv, window + suffix_tokens, D]`, filled from the left."""

    is_compileable = True
    suffix_tokens: int

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        if key_states.shape[-2] > self.suffix_tokens:
            raise SqueezedError(
                f"suffix_tokens: the cache has room for {self.suffix_tokens} tokens after the "
                f"document, the input alone has {key_states.shape[-2]}; ask for a larger cache"
            )
        rows = self.window_tokens + self.suffix_tokens
        with torch.inference_mode(False):
            self.keys, self.values = (
                x.new_zeros(*x.shape[:2], rows, x.shape[-1]) for x in (key_states, value_states)
            )
            self.filled = torch.zeros((), dtype=torch.int64, device=self.device)
        keep_address(self.keys, self.values, self.filled)

    @torch.compiler.disable
    def start(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the buffers outside of a graph, also where the first tokens are read by one."""
        self.lazy_initialization(key_states, value_states)

    def write(self, key_states: Tensor, value_states: Tensor) -> None:
        """Put new tokens behind the ones so far."""
        if not self.is_initialized:
            self.start(key_states, value_states)
        count = key_states.shape[-2]
        slots = torch.arange(count, device=self.device) + self.window_tokens + self.filled
        self.keys.index_copy_(2, slots, key_states)
        self.values.index_copy_(2, slots, value_states)
        self.filled.add_(count)

    @property
    def suffix_length(self):
        return self.filled if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.window_tokens + self.suffix_tokens, self.tokens - self.window_tokens

    def get_max_length(self) -> int:
        return self.tokens + self.suffix_tokens

    @property
    def most_tokens(self) -> int:
        return self.get_max_length()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            self.keys.copy_(self.keys.index_select(0, beam_idx.to(self.device)))
            self.values.copy_(self.values.index_select(0, beam_idx.to(self.device)))

    def crop(self, tokens_to_remove: int) -> None:
        if self.is_initialized:
            self.filled.sub_(abs(tokens_to_remove))

    def reset(self) -> None:
        if self.is_initialized:
            self.filled.zero_()


class StaticContextLayer(StaticSuffix, ContextLayer):
    """Full attention over a fixed context, and a suffix of at most `suffix_tokens`."""

    def __init__(self, context: ContextAttention, suffix_tokens: int) -> None:
        super().__init__(context)
        self.suffix_tokens = suffix_tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        counters = (self.keys_read, self.queries_answered, self.tokens_answered)
        keep_address(*counters, *self.context.tensors())

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        self.write(self.context.layer.centred(key_states), value_states)
        return self.hand_over()


class StaticWindowedLayer(StaticSuffix, WindowedLayer):
    """A sliding window over the document's last tokens and a suffix of at most `suffix_tokens`."""

    def __init__(self, context: WindowLayer, suffix_tokens: int) -> None:
        super().__init__(context)
        self.suffix_tokens = suffix_tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys[:, :, : self.window_tokens] = self.context.keys
        self.values[:, :, : self.window_tokens] = self.context.values

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        self.write(key_states, value_states)
        return self.keys, self.values


def keep_address(*tensors: Tensor) -> None:
    """Promise that these tensors stay where they are, so that a CUDA graph reads them in place."""
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor)
