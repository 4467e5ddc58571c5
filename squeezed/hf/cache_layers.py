"""Layers of the cache: full attention over a fixed context, and its sliding windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from squeezed.attention.interface import Attended, Suffix
from squeezed.context.layers import WindowLayer
from squeezed.errors import SqueezedError
from squeezed.hf.attention import Handover
from squeezed.hf.suffix import SuffixLayer, check_mask
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


class Listener(Protocol):
    """Hears what a layer was asked, as `ContextAttention.attend` takes it, and what it found."""

    def __call__(
        self, query: Tensor, suffix: Suffix, valid: Tensor | None, per_token: bool, found: Attended
    ) -> None: ...


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
        self.listen: Listener | None = None
        self.asked_again = False  # by a layer that shares these keys
        self.keys_read: Tensor | None = None
        self.queries_answered: Tensor | None = None
        self.tokens_answered: Tensor | None = None
        self.surplus = 0  # keys that earlier queries could not choose among

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
        key_states, value_states = (x.to(layer.dtype) for x in (key_states, value_states))
        heads, width = layer.kv_heads, layer.dim
        if (heads, width) != (key_states.shape[1], key_states.shape[-1]):
            raise SqueezedError(
                f"past_key_values: the context has {heads} key heads of {width} dimensions, this "
                f"model {key_states.shape[1]} of {key_states.shape[-1]}: another model made it"
            )
        return layer.centred(key_states), value_states

    def hand_over(self) -> tuple[Handover, Handover]:
        self.asked_again = False
        document = self.tokens, self.most_tokens, self.check, self.recognise_once
        handover = Handover(self.answer, self.keys.dtype, *document)
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
        check_mask(mask, len(query), self.keys.shape[2])
        valid = self.padding.look(mask, len(query), first=self.checks_positions)
        per_token = query.shape[2] == 1 or self.select_per_token
        suffix = Suffix(self.keys, self.values, mask)
        found = self.context.attend(query, suffix, valid, per_token)
        if self.listen is not None:
            self.listen(query, suffix, valid, per_token, found)
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
        self.surplus = 0
        if self.keys_read is not None:
            for counter in self.counters():
                counter.zero_()

    def continues(self, old: ContextLayer) -> None:
        """Count, listen and watch on where a layer of fewer context tokens ends."""
        self.keys_read, self.queries_answered, self.tokens_answered = old.counters()
        more = self.context.selectable_keys - old.context.selectable_keys
        self.surplus = old.surplus + int(self.queries_answered) * more
        self.select_per_token = old.select_per_token
        self.watch, self.listen, self.recognise = old.watch, old.listen, old.recognise


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
