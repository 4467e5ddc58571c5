"""The cache that `generate()` gets: a shared fixed context, and each request's own recent tokens.

Only the suffix (user and generated tokens) has a batch dimension. Reordering, repeating, selecting
and cropping touch the suffix alone, so beam search and batches share one copy of the context.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from squeezed.hf.attention import Handover
from squeezed.methods.base import ContextAttention
from squeezed.tree import WindowLayer


class SuffixLayer(DynamicLayer):
    """A layer after a fixed context of `tokens` tokens: only its suffix grows and has a batch."""

    def __init__(self, tokens: int, window_tokens: int = 0) -> None:
        super().__init__()
        self.tokens, self.window_tokens = tokens, window_tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    @property
    def suffix_length(self) -> int:
        return self.keys.shape[-2] if self.is_initialized else 0

    def get_seq_length(self) -> int:
        return self.tokens + self.suffix_length

    @property
    def most_tokens(self) -> int:
        """Tokens held at most, for who must know it without waiting for the device."""
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The mask covers the suffix, and the context's last tokens if they are a window."""
        visible = self.window_tokens + self.suffix_length + query_length
        return visible, self.tokens - self.window_tokens

    def crop(self, tokens_to_remove: int) -> None:
        if self.suffix_length:
            super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.suffix_length:
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.suffix_length:
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.suffix_length:
            super().batch_select_indices(indices)


class ContextLayer(SuffixLayer):
    """Full attention over a fixed context, by any method, and a dense suffix `[B, Hkv, S, D]`."""

    is_sliding = False

    def __init__(self, context: ContextAttention) -> None:
        super().__init__(context.tokens)
        self.context = context
        self.select_per_token = False
        self.watch: list[Tensor] | None = None
        self.asked_again = False  # by a layer that shares these keys
        self.keys_read: Tensor | None = None
        self.queries_answered: Tensor | None = None
        self.tokens_answered: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        with torch.inference_mode(False):  # so that later calls may count in any mode
            self.keys_read = torch.zeros((), dtype=torch.int64, device=self.device)
            self.queries_answered = torch.zeros_like(self.keys_read)
            self.tokens_answered = torch.zeros_like(self.keys_read)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        super().update(self.context.layer.centred(key_states), value_states)
        return self.hand_over()

    def hand_over(self) -> tuple[Handover, Handover]:
        self.asked_again = False
        handover = Handover(self.attend, self.tokens, self.most_tokens)
        return handover, handover

    def attend(self, query: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Attention of `query [B, Hq, Q, D]`; `mask` covers the suffix only.

        The model's layer that owns the keys comes first; others that share them may follow.
        """
        if self.watch is not None:
            self.watch.append(query[:, :, -1:] if self.asked_again else query)
        per_token = query.shape[2] == 1 or self.select_per_token
        output, keys_read = self.context.attend(
            query, self.keys, self.values, mask, scale, per_token
        )
        self._account(query, mask, keys_read)
        return output

    def _account(self, query: Tensor, mask: Tensor | None, keys_read: Tensor) -> None:
        """Count in place: a compiled step must not make new tensors that outlive it."""
        self.keys_read.add_(keys_read.sum())
        if mask is None:
            answered = query.shape[0] * query.shape[2]
        else:
            answered = mask.any(-1).expand(query.shape[0], -1, -1).sum()
        self.queries_answered.add_(answered)
        if not self.asked_again:
            self.tokens_answered.add_(answered)
        self.asked_again = True

    def restart_spending(self) -> None:
        if self.is_initialized:
            self.keys_read.zero_()
            self.queries_answered.zero_()
            self.tokens_answered.zero_()


class WindowedLayer(SuffixLayer):
    """Sliding-window attention: the document's last tokens, shared, and the whole suffix.

    The suffix is not cut to the window: in a left-padded batch the window of each request reaches
    back by its own number of columns, which only the mask knows.
    """

    is_sliding = True

    def __init__(self, context: WindowLayer) -> None:
        super().__init__(context.tokens, context.keys.shape[1])
        self.context = context

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        keys, values = super().update(key_states, value_states)
        batch = keys.shape[0]
        window = (x.expand(batch, -1, -1, -1) for x in (self.context.keys, self.context.values))
        return tuple(torch.cat(pair, 2) for pair in zip(window, (keys, values), strict=True))


@dataclass(frozen=True)
class Spending:
    """What a request really read.

    Attributes:
        budget: share of the clustered keys read exactly, over heads, layers and tokens.
        keys_read: clustered keys read exactly per query token, summed over KV heads and layers.
    """

    budget: float
    keys_read: float


class SqueezedCache(Cache):
    """A cache over a fixed context. Pass it as `past_key_values`; make one per request or batch."""

    def __init__(self, layers: list[SuffixLayer], budget: float) -> None:
        super().__init__(layers=layers)
        self.budget = budget

    @property
    def context_layers(self) -> list[ContextLayer]:
        return [layer for layer in self.layers if isinstance(layer, ContextLayer)]

    def select_per_token(self, enabled: bool = True) -> None:
        """Let every token of a longer input select alone, as in decoding (teacher forcing)."""
        for layer in self.context_layers:
            layer.select_per_token = enabled

    def watch_queries(self) -> None:
        """Keep every query from now on, for `squeezed.sources`."""
        for layer in self.context_layers:
            layer.watch = []

    def restart_spending(self) -> None:
        """Count keys from here on."""
        for layer in self.context_layers:
            layer.restart_spending()

    def spending(self) -> Spending:
        """What was read since the start, or since `restart_spending()`. Waits for the device."""
        read = available = 0.0
        tokens = 0
        for layer in self.context_layers:
            if layer.keys_read is None:
                continue
            tokens = int(layer.tokens_answered)
            read += float(layer.keys_read)
            available += int(layer.queries_answered) * layer.context.selectable_keys
        return Spending(
            budget=read / available if available else 1.0,
            keys_read=read / tokens if tokens else 0.0,
        )


def suffix_mask(tokens: int, suffix: Tensor) -> Tensor:
    """The full-length 2-D mask that `generate()` wants beside suffix ids, `[B, P + S]`."""
    context = torch.ones(suffix.shape[0], tokens, dtype=suffix.dtype, device=suffix.device)
    return torch.cat([context, suffix], 1)
