"""A cache layer after a fixed context: the tokens that each request adds to it.

Only they have a batch dimension. Reordering, repeating, selecting and cropping touch them alone, so
beam search and batches share one copy of the context.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from squeezed.errors import SqueezedError


class SuffixLayer(DynamicLayer):
    """A layer after a fixed context of `tokens` tokens: only its suffix grows and has a batch.

    Attributes:
        last: the last layer of the same cache. A pass that is interrupted leaves early layers with
            more tokens than it; they drop them when the next pass comes.
    """

    def __init__(self, tokens: int, window_tokens: int = 0) -> None:
        super().__init__()
        self.tokens, self.window_tokens = tokens, window_tokens
        self.last: SuffixLayer = self

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    @property
    def suffix_length(self) -> int:
        return self.values.shape[-2] if self.is_initialized else 0  # values come after keys

    @property
    def completed(self) -> int:
        """Tokens after the document that went through every layer."""
        return self.last.suffix_length

    def get_seq_length(self) -> int:
        return self.tokens + self.completed

    @property
    def most_tokens(self) -> int:
        """Tokens held at most, for who must know it without waiting for the device."""
        return self.tokens + self.suffix_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The mask covers the suffix, and the context's last tokens if they are a window."""
        check_new_tokens(query_length)
        visible = self.window_tokens + self.completed + query_length
        return visible, self.tokens - self.window_tokens

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        self.prepare(key_states, value_states)
        return super().update(key_states, value_states)

    def prepare(self, key_states: Tensor, value_states: Tensor) -> None:
        """Drop what an interrupted pass left, and refuse another number of requests than before."""
        check_positioned(key_states, value_states)
        if not self.is_initialized:
            return
        completed = self.completed
        if not completed:
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        elif self.keys.shape[-2] != completed or self.values.shape[-2] != completed:
            self.trim(completed)
        check_rows(self.keys, key_states)

    def trim(self, length: int) -> None:
        """Keep the first `length` tokens of the suffix."""
        if self.is_initialized:
            self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]

    def keep_first_row(self) -> None:
        """Let the first request of the batch stay alone."""
        if self.is_initialized and self.keys.shape[0] > 1:
            self.keys, self.values = self.keys[:1], self.values[:1]

    def crop(self, tokens_to_remove: int) -> None:
        self.trim(max(0, int(self.suffix_length) - abs(tokens_to_remove)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.suffix_length:
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.suffix_length:
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.suffix_length:
            super().batch_select_indices(indices)


def check_new_tokens(count: int) -> None:
    """Raise `SqueezedError` for an input of which nothing is new."""
    if count < 1:
        raise SqueezedError(
            "attention_mask: by the mask every token of the input is in the cache already; pass "
            "attention_mask=suffix_mask(cache.get_seq_length(), ...), which counts the document too"
        )


def check_mask(mask: Tensor | None, requests: int, suffix: int) -> None:
    """Raise `SqueezedError` for a mask of the caller's own shape, which nobody made for a suffix.

    Args:
        mask: `[B, 1, Q, S]` bool, as `squeezed_mask` makes it; one row may stand for all.
        requests, suffix: rows and columns of the suffix, `B` and `S`.
    """
    if mask is None:
        return
    fits = mask.shape[0] in (1, requests) and mask.shape[-1] == suffix
    if mask.dtype != torch.bool or not fits:
        raise SqueezedError(
            f"attention_mask: expected one row per request, got {tuple(mask.shape)} of "
            f"{mask.dtype}; pass suffix_mask(cache.get_seq_length(), ...)"
        )


def check_positioned(keys: Tensor, values: Tensor) -> None:
    """Raise `SqueezedError` unless positions, which turn keys alone, were given for every request.

    They come from the mask: with more rows than there are requests it multiplies the keys.
    """
    if keys.shape[0] != values.shape[0]:
        raise SqueezedError(
            f"attention_mask: expected one row per request, {values.shape[0]}, got "
            f"{keys.shape[0]}; pass suffix_mask(cache.get_seq_length(), ...)"
        )


def check_rows(held: Tensor, new: Tensor) -> None:
    """Raise `SqueezedError` unless the suffix and the input are equally many requests."""
    if held.shape[0] != new.shape[0]:
        raise SqueezedError(
            f"past_key_values: the cache continues {held.shape[0]} requests, the input has "
            f"{new.shape[0]}; make a new cache with context.cache(), or repeat or select its rows"
        )
