"""The cache that `generate()` gets: a shared fixed context, and each request's own recent tokens.

Only the suffix (user and generated tokens) has a batch dimension. Reordering, repeating, selecting
and cropping touch the suffix alone, so beam search and batches share one copy of the context.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from squeezed.attention.interface import Suffix
from squeezed.context.layers import WindowLayer
from squeezed.errors import SqueezedError
from squeezed.hf.attention import Handover
from squeezed.methods.base import ContextAttention


class Padding:
    """Which of the new tokens are none: looked up once per pass, for all layers get one mask."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.valid: Tensor | None = None

    def look(self, mask: Tensor | None, requests: int, first: bool) -> Tensor | None:
        """`[B, Q]` bool, False for padding, from the mask of the suffix `[B, 1, Q, S]`.

        Args:
            first: the layer that asks is the first of a pass.
        """
        if mask is None:
            return None
        if torch.compiler.is_compiling():  # nothing of a graph may outlive it
            return real_tokens(mask, requests)
        if first or self.mask is not mask:
            self.mask, self.valid = mask, real_tokens(mask, requests)
        return self.valid


def real_tokens(mask: Tensor, requests: int) -> Tensor:
    """`[B, Q]` bool: tokens that see any, as `squeezed_mask` has it; padding sees none."""
    return mask.any(-1)[:, 0].expand(requests, -1)


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


def check_mask(mask: Tensor | None, suffix: int) -> None:
    """Raise `SqueezedError` for a mask of the caller's own shape, which nobody made for a suffix.

    Args:
        mask: `[B, 1, Q, S]` bool, as `squeezed_mask` makes it.
        suffix: columns of the suffix, `S`.
    """
    if mask is not None and (mask.dtype != torch.bool or mask.shape[-1] != suffix):
        raise SqueezedError(
            f"attention_mask: expected one row per request, got {tuple(mask.shape)} of "
            f"{mask.dtype}; pass suffix_mask(cache.get_seq_length(), ...)"
        )


def check_rows(held: Tensor, new: Tensor) -> None:
    """Raise `SqueezedError` unless the suffix and the input are equally many requests."""
    if held.shape[0] != new.shape[0]:
        raise SqueezedError(
            f"past_key_values: the cache continues {held.shape[0]} requests, the input has "
            f"{new.shape[0]}; make a new cache with context.cache(), or repeat or select its rows"
        )


class ContextLayer(SuffixLayer):
    """Full attention over a fixed context, by any method, and a dense suffix `[B, Hkv, S, D]`."""

    is_sliding = False

    def __init__(self, context: ContextAttention) -> None:
        super().__init__(context.tokens)
        self.context = context
        self.select_per_token = False
        self.padding = Padding()
        self.checks_positions = False
        self.recognise: Callable[[nn.Module], None] | None = None
        self.watch: list[Tensor] | None = None
        self.asked_again = False  # by a layer that shares these keys
        self.keys_read: Tensor | None = None
        self.queries_answered: Tensor | None = None
        self.tokens_answered: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        if self.keys_read is not None:
            return
        with torch.inference_mode(False):  # so that later calls may count in any mode
            self.keys_read = torch.zeros((), dtype=torch.int64, device=self.device)
            self.queries_answered = torch.zeros_like(self.keys_read)
            self.tokens_answered = torch.zeros_like(self.keys_read)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        super().update(*self.stored(key_states, value_states))
        return self.hand_over()

    def stored(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values as those of the context are kept."""
        layer = self.context.layer
        key_states, value_states = (x.to(layer.keys.dtype) for x in (key_states, value_states))
        heads, width = layer.keys.shape[0], layer.keys.shape[-1]
        if (heads, width) != (key_states.shape[1], key_states.shape[-1]):
            raise SqueezedError(
                f"past_key_values: the context has {heads} key heads of {width} dimensions, this "
                f"model {key_states.shape[1]} of {key_states.shape[-1]}: another model made it"
            )
        return layer.centred(key_states), value_states

    def hand_over(self) -> tuple[Handover, Handover]:
        self.asked_again = False
        document = (self.tokens, self.most_tokens, self.check)
        handover = Handover(self.answer, self.keys.dtype, *document)
        handover.recognise = self.recognise_once
        return handover, handover

    def recognise_once(self, module: nn.Module) -> None:
        """Let the first attention module that asks be compared with the one that made the keys."""
        if self.recognise is not None and not torch.compiler.is_compiling():
            self.recognise(module)
            self.recognise = None

    def check(self, query: Tensor, mask: Tensor | None, position_ids: Tensor | None) -> None:
        """Raise `SqueezedError` unless the input's positions follow the tokens that are held.

        They do not when a cache is used for a second request, or the mask does not tell how many
        tokens there were. One layer looks, and at a GPU's single tokens nobody: it would wait.
        """
        if not self.checks_positions or position_ids is None or torch.compiler.is_compiling():
            return
        rows = query.shape[2]
        if position_ids.ndim != 2 or (rows == 1 and query.device.type != "cpu"):
            return
        if mask is None:
            seen = self.suffix_length - rows + 1 + torch.arange(rows, device=query.device)
        elif mask.dtype == torch.bool:
            seen = mask[:, 0].sum(-1)  # [B, Q], 0 for padding
        else:
            return
        wrong = (seen > 0) & (position_ids[:, -rows:].to(seen.device) != self.tokens + seen - 1)
        if bool(wrong.any()):
            raise SqueezedError(self._misplaced(position_ids))

    def _misplaced(self, position_ids: Tensor) -> str:
        held = int(self.completed)
        return (
            f"past_key_values: the cache holds a document of {self.tokens} tokens and {held} more, "
            f"the input's positions begin at {int(position_ids[0, 0])}; make a new cache with "
            "context.cache() for every request, or continue this one with "
            "attention_mask=suffix_mask(cache.get_seq_length(), ...)"
        )

    def answer(self, query: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Attention of `query [B, Hq, Q, D]`; `mask` covers the suffix only.

        The model's layer that owns the keys comes first; others that share them may follow.
        """
        if self.watch is not None:
            self.watch.append(query[:, :, -1:] if self.asked_again else query)
        if scale != self.context.layer.scale:
            raise SqueezedError(
                f"past_key_values: the context's softmax scale is {self.context.layer.scale}, this "
                f"model's {scale}: another model made it"
            )
        check_mask(mask, self.keys.shape[2])
        valid = self.padding.look(mask, len(query), first=self.checks_positions)
        per_token = query.shape[2] == 1 or self.select_per_token
        suffix = Suffix(self.keys, self.values, mask)
        found = self.context.attend(query, suffix, valid, per_token)
        self._account(query, valid, found.keys_read)
        return found.output

    def counters(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys read, queries and tokens answered; there since the first tokens came."""
        read, queries, tokens = self.keys_read, self.queries_answered, self.tokens_answered
        assert read is not None and queries is not None and tokens is not None
        return read, queries, tokens

    def _account(self, query: Tensor, valid: Tensor | None, keys_read: Tensor) -> None:
        """Count in place: a compiled step must not make new tensors that outlive it."""
        read, queries, tokens = self.counters()
        read.add_(keys_read.sum())
        answered: Tensor | int = query.shape[0] * query.shape[2]
        if valid is not None:
            answered = valid.sum()
        queries.add_(answered)
        if not self.asked_again:
            tokens.add_(answered)
        self.asked_again = True

    def reset(self) -> None:
        super().reset()
        self.restart_spending()

    def restart_spending(self) -> None:
        if self.keys_read is not None:
            for counter in self.counters():
                counter.zero_()


class WindowedLayer(SuffixLayer):
    """Sliding-window attention: the document's last tokens, shared, and the whole suffix.

    The suffix is not cut to the window: in a left-padded batch the window of each request reaches
    back by its own number of columns, which only the mask knows.
    """

    is_sliding = True

    def __init__(self, context: WindowLayer) -> None:
        super().__init__(context.tokens, context.keys.shape[1])
        self.context = context

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        keys, values = super().update(key_states, value_states)
        batch = keys.shape[0]
        window_keys = self.context.keys.to(keys.dtype).expand(batch, -1, -1, -1)
        window_values = self.context.values.to(values.dtype).expand(batch, -1, -1, -1)
        return torch.cat([window_keys, keys], 2), torch.cat([window_values, values], 2)


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
    """A cache over a fixed context. Pass it as `past_key_values`; make one per request or batch.

    A copy (`copy.deepcopy`) shares the context and has a suffix of its own.

    Attributes:
        document: `[P]` int64, the context's tokens.
        known: `[n]` int64, ids of the first tokens after the document that every request of the
            batch has in common, as far as `remember()` was told.
    """

    def __init__(self, layers: list[SuffixLayer], budget: float, document: Tensor) -> None:
        super().__init__(layers=layers)
        self.budget, self.document = budget, document.cpu()
        self.known = self.document[:0]
        for layer in layers:
            layer.last = layers[-1]
        padding = Padding()
        for layer in self.context_layers:
            layer.padding = padding
        for layer in self.context_layers[:1]:
            layer.checks_positions = True

    def __deepcopy__(self, memo: dict) -> SqueezedCache:
        shared = [self.document, *(layer.context for layer in self.layers)]
        memo |= {id(each): each for each in shared}
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __copy__(self) -> SqueezedCache:
        return copy.deepcopy(self)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        if layer_idx >= len(self.layers):
            raise SqueezedError(
                f"past_key_values: the cache has {len(self.layers)} layers, the model has more; "
                "use the model that made the context"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens of the suffix, as Transformers asks: `-n` removes `n`."""
        held = int(self.layers[-1].suffix_length)
        if not -held <= tokens_to_remove <= 0:
            raise SqueezedError(
                f"crop: expected -n to remove n of the {held} tokens after the document, which "
                f"stays; got {tokens_to_remove}"
            )
        self._trim(held + tokens_to_remove)

    def reset(self) -> None:
        """Forget everything after the document."""
        self.known = self.known[:0]
        for layer in reversed(self.layers):
            layer.reset()

    def rewind(self, ids: Tensor) -> None:
        """Keep the longest beginning of `ids` that is held, of one request, and not all of `ids`.

        Args:
            ids: `[S]` int64, everything that shall follow the document.
        """
        longest = min(len(self.known), len(ids) - 1)
        alike = self.known[:longest] == ids[:longest]
        self._trim(int(alike.long().cumprod(0).sum()))
        for layer in self.layers:
            layer.keep_first_row()

    def remember(self, ids: Tensor) -> None:
        """Note that the suffix begins with `ids` `[S]`; those not yet read are left out."""
        self.known = ids.cpu()[: int(self.layers[-1].suffix_length)]

    def _trim(self, length: int) -> None:
        self.known = self.known[:length]
        for layer in reversed(self.layers):  # the last one first: it says what is complete
            layer.trim(length)

    @property
    def context_layers(self) -> list[ContextLayer]:
        return [layer for layer in self.layers if isinstance(layer, ContextLayer)]

    def select_per_token(self, enabled: bool = True) -> None:
        """Let every token of a longer input select alone, as in decoding (teacher forcing)."""
        for layer in self.context_layers:
            layer.select_per_token = enabled

    def watch_queries(self) -> None:
        """Keep every query from now on, for `squeezed.answers.sources`."""
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
            keys_read, queries, answered = layer.counters()
            tokens = int(answered)
            read += float(keys_read)
            available += int(queries) * layer.context.selectable_keys
        return Spending(
            budget=read / available if available else 1.0,
            keys_read=read / tokens if tokens else 0.0,
        )


def suffix_mask(tokens: int, suffix: Tensor) -> Tensor:
    """The full-length 2-D mask that `generate()` wants beside suffix ids, `[B, P + S]`."""
    context = torch.ones(suffix.shape[0], tokens, dtype=suffix.dtype, device=suffix.device)
    return torch.cat([context, suffix], 1)
