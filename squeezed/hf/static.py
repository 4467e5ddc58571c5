"""Cache layers whose suffix is a buffer of fixed size: `generate()` compiles the decode step.

Transformers compiles the forward pass, with CUDA graphs, when every layer of a cache says that it
is compileable. Nothing here may depend on values: the number of tokens so far is a tensor, and what
the graph reads keeps its address.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from squeezed.context.layers import WindowLayer
from squeezed.errors import SqueezedError
from squeezed.hf.cache_layers import ContextLayer, WindowedLayer
from squeezed.hf.suffix import SuffixLayer, check_new_tokens, check_positioned, check_rows
from squeezed.methods.base import ContextAttention


class StaticSuffix(SuffixLayer):
    """Keys and values `[B, Hkv, window + suffix_tokens, D]`, filled from the left."""

    is_compileable = True
    suffix_tokens: int

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._check_room(0, key_states.shape[-2])
        with torch.inference_mode(False):
            self.filled = torch.zeros((), dtype=torch.int64, device=self.device)
        keep_address(self.filled)
        self._allocate(key_states, value_states)

    def _allocate(self, key_states: Tensor, value_states: Tensor) -> None:
        rows = self.window_tokens + self.suffix_tokens
        with torch.inference_mode(False):
            self.keys, self.values = (
                x.new_zeros(*x.shape[:2], rows, x.shape[-1]) for x in (key_states, value_states)
            )
        keep_address(self.keys, self.values)

    def prepare(self, key_states: Tensor, value_states: Tensor) -> None:
        if not self.is_initialized:
            self.start(key_states, value_states)
        if torch.compiler.is_compiling():
            return
        check_positioned(key_states, value_states)
        if not self.last.is_initialized:
            self.filled.zero_()
        elif self.last is not self:
            self.filled.copy_(self.last.filled)
        if self.keys.shape[0] != key_states.shape[0]:
            if int(self.completed):
                check_rows(self.keys, key_states)
            self._allocate(key_states, value_states)

    @torch.compiler.disable
    def start(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the buffers outside of a graph, also where the first tokens are read by one."""
        self.lazy_initialization(key_states, value_states)

    def write(self, key_states: Tensor, value_states: Tensor) -> None:
        """Put new tokens behind the ones so far."""
        self.prepare(key_states, value_states)
        count = key_states.shape[-2]
        slots = torch.arange(count, device=self.device) + self.window_tokens + self.filled
        self.keys.index_copy_(2, slots, key_states)
        self.values.index_copy_(2, slots, value_states)
        self.filled.add_(count)

    @property
    def suffix_length(self) -> Any:
        return self.filled if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        check_new_tokens(query_length)
        if not torch.compiler.is_compiling():
            self._check_room(int(self.completed), query_length)
        return self.window_tokens + self.suffix_tokens, self.tokens - self.window_tokens

    def _check_room(self, held: int, new: int) -> None:
        if held + new > self.suffix_tokens:
            raise SqueezedError(
                f"suffix_tokens: the cache has room for {self.suffix_tokens} tokens after the "
                f"document, it holds {held} and {new} more come; make a larger one with "
                "context.cache(suffix_tokens=...)"
            )

    def get_max_length(self) -> int:
        return self.tokens + self.suffix_tokens

    @property
    def most_tokens(self) -> int:
        return self.get_max_length()

    def trim(self, length: int) -> None:
        if self.is_initialized:
            self.filled.fill_(length)

    def keep_first_row(self) -> None:
        if self.is_initialized and self.keys.shape[0] > 1:
            self._change_rows(lambda x: x[:1].clone())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            self.keys.copy_(self.keys.index_select(0, beam_idx.to(self.device)))
            self.values.copy_(self.values.index_select(0, beam_idx.to(self.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._change_rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self._change_rows(lambda x: x[indices])

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        with torch.inference_mode(False):
            self.keys, self.values = change(self.keys), change(self.values)
        keep_address(self.keys, self.values)

    def reset(self) -> None:
        self.trim(0)


class StaticContextLayer(StaticSuffix, ContextLayer):
    """Full attention over a fixed context, and a suffix of at most `suffix_tokens`."""

    def __init__(self, context: ContextAttention, suffix_tokens: int) -> None:
        super().__init__(context)
        self.suffix_tokens = suffix_tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        keep_address(*self.counters(), *self.context.tensors())

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        self.write(*self.stored(key_states, value_states))
        return self.hand_over()

    def reset(self) -> None:
        super().reset()
        self.restart_spending()


class StaticWindowedLayer(StaticSuffix, WindowedLayer):
    """A sliding window over the document's last tokens and a suffix of at most `suffix_tokens`."""

    def __init__(self, context: WindowLayer, suffix_tokens: int) -> None:
        super().__init__(context)
        self.suffix_tokens = suffix_tokens

    def _allocate(self, key_states: Tensor, value_states: Tensor) -> None:
        super()._allocate(key_states, value_states)
        self.keys[:, :, : self.window_tokens] = self.context.keys
        self.values[:, :, : self.window_tokens] = self.context.values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        self.write(key_states, value_states)
        return self.keys, self.values


def keep_address(*tensors: Tensor) -> None:
    """Promise that these tensors stay where they are, so that a CUDA graph reads them in place."""
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor)
