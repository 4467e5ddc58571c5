"""The cache that `generate()` gets: its layers, what it remembers, and what was read through it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from squeezed.context.record import ContextRecord
from squeezed.errors import SqueezedError, expect
from squeezed.hf.cache_layers import ContextLayer, Padding
from squeezed.hf.suffix import SuffixLayer


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
        folded: tokens that were the first after the context's and belong to `document` since they
            were clustered (`squeezed.hf.folding`).
    """

    def __init__(self, layers: list[SuffixLayer], budget: float, document: Tensor) -> None:
        super().__init__(layers=layers)
        self.budget, self.document = budget, document.cpu()
        self.known = self.document[:0]
        self.folded: ContextRecord | None = None
        for layer in layers:
            layer.last = layers[-1]
        padding = Padding()
        for layer in self.context_layers:
            layer.padding = padding
        for layer in self.context_layers[:1]:
            layer.checks_positions = True

    def __deepcopy__(self, memo: dict) -> SqueezedCache:
        shared = [self.document, self.folded, *(layer.context for layer in self.layers)]
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
        expect("crop", tokens_to_remove, Integral, "a whole number, -n to remove n tokens")
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

    def becomes(self, other: SqueezedCache) -> None:
        """Hold what another cache does, which nobody uses any more."""
        self.__dict__.update(other.__dict__)

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
            available += int(queries) * layer.context.selectable_keys - layer.surplus
        return Spending(
            budget=read / available if available else 1.0,
            keys_read=read / tokens if tokens else 0.0,
        )


def suffix_mask(tokens: int, suffix: Tensor) -> Tensor:
    """The full-length 2-D mask that `generate()` wants beside suffix ids, `[B, P + S]`."""
    context = torch.ones(suffix.shape[0], tokens, dtype=suffix.dtype, device=suffix.device)
    return torch.cat([context, suffix], 1)
