"""The attention and mask functions that `model.set_attn_implementation("squeezed")` selects.

Transformers does not pass the cache to an attention function. So a squeezed cache layer returns a
`Handover` from `update()` in place of keys and values, and the function below lets it answer. Any
other attention function that receives a `Handover` fails with the remedy instead of attending to
half of the keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    sdpa_mask,
)

from squeezed.errors import SqueezedError, UnsupportedModelError
from squeezed.hf.rope import check_rope

NAME = "squeezed"

REMEDY = (
    'a squeezed cache needs the squeezed attention function: call model.set_attn_implementation("'
    f'{NAME}") first'
)

UNKNOWN_TO_SDPA = {
    "softcap": "soft-capped logits",
    "s_aux": "learned attention sinks",
    "sinks": "learned attention sinks",
    "indices": "keys chosen by an indexer",
    "block_indices": "keys chosen by an indexer",
}
"""Arguments of an attention function that would go unheeded, and what they mean."""

UNKNOWN = UNKNOWN_TO_SDPA | {"position_bias": "position biases"}

Answering = Callable[[Tensor, "Tensor | None", float], Tensor]

Check = Callable[[Tensor, "Tensor | None", "Tensor | None"], None]
"""Called with query, mask and position ids before the layer answers; raises if they do not fit."""


class Handover:
    """Stands in for the keys and values of a layer; only `squeezed_attention_forward` opens it.

    Layers without keys of their own get that of the layer they share with, and ask it again.
    """

    def __init__(
        self,
        answer: Answering,
        dtype: torch.dtype,
        document: int = 0,
        tokens: int = 0,
        check: Check | None = None,
        recognise: Callable[[nn.Module], None] | None = None,
    ) -> None:
        """`answer` takes queries of `dtype`, whatever `torch.autocast` made of the model's.

        `tokens` may be in the cache after a document of `document`; 0 while that is read.
        `recognise` is called with the attention module that opens it.
        """
        self.answer, self.dtype, self.check, self.recognise = answer, dtype, check, recognise
        self.document, self.tokens = document, tokens

    def to(self, *args: Any, **kwargs: Any) -> Handover:
        """Where weights wait on another device, what layers share is moved with them."""
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise SqueezedError(REMEDY)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        raise SqueezedError(REMEDY)


def squeezed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Handover,
    value: Tensor | Handover,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as Transformers calls it: `query [B, Hq, Q, D]` -> `([B, Q, Hq, D], None)`.

    With an ordinary cache, or none, this is scaled-dot-product attention.
    """
    if not isinstance(key, Handover):
        refuse(module, kwargs, UNKNOWN_TO_SDPA)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    refuse(module, kwargs, UNKNOWN)
    if not kwargs.get("is_causal", getattr(module, "is_causal", True)):
        raise _refusal(module, "attention to later tokens")
    if key.document:
        check_rope(module.config, key.document, key.tokens)
    if key.recognise is not None:
        key.recognise(module)
    if key.check is not None:
        key.check(query, attention_mask, kwargs.get("position_ids"))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(query.device.type, enabled=False):
        output = key.answer(query.to(key.dtype), attention_mask, scale)
    if query.requires_grad and not output.requires_grad and torch.is_grad_enabled():
        output = _WithoutGradient.apply(output, query)
    return output.transpose(1, 2).to(query.dtype).contiguous(), None


class _WithoutGradient(torch.autograd.Function):
    """An answer of kernels, which say nothing of how it depends on the query.

    Without it a loss would go past the attention in silence, and train the rest.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, query: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
        raise SqueezedError(
            "backward: attention over a fixed context has no gradient in its kernels; train with "
            "an ordinary cache, or answer with context.cache(implementation='reference')"
        )


def refuse(module: nn.Module, kwargs: dict[str, Any], changes: dict[str, str]) -> None:
    """Raise for arguments that change the attention formula in a way we do not reproduce."""
    for name, what in changes.items():
        if kwargs.get(name) is not None:
            raise _refusal(module, what)


def _refusal(module: nn.Module, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(module).__name__} uses {what}, which squeezed attention does not "
        "reproduce; use a model without them, or dense attention"
    )


def squeezed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Mask `[B, 1, Q, K]` as Transformers asks for it, True where attended.

    With a 2-D `attention_mask [B, tokens]`, distances count real tokens instead of columns: a
    request whose padding lies between the document and its question still sees its whole sliding
    window. Rows of padding attend to nothing, by which the kernels know them.
    """
    if attention_mask is None:
        if kv_offset or isinstance(q_offset, Tensor):  # part of the keys, or slots yet empty
            kwargs["allow_is_causal_skip"] = False
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, None, **kwargs
        )
    if kv_offset:
        check_mask_length(attention_mask, q_offset, q_length)
    missing = kv_offset + kv_length - attention_mask.shape[-1]
    real = torch.nn.functional.pad(attention_mask, (0, max(0, missing))).bool()
    position = real.long().cumsum(-1) - 1
    rows = torch.arange(q_length, device=real.device) + q_offset
    columns = torch.arange(kv_length, device=real.device) + kv_offset
    batch = torch.arange(batch_size, device=real.device)[:, None, None, None]
    query_position = position[:, rows][:, None, :, None]
    key_position = position[:, columns][:, None, None, :]
    seen = mask_function(batch, torch.zeros_like(batch), query_position, key_position)
    return seen & real[:, rows][:, None, :, None] & real[:, columns][:, None, None, :]


def check_mask_length(attention_mask: Tensor, q_offset: Tensor | int, q_length: int) -> None:
    """Raise `SqueezedError` for a mask `[B, tokens]` that ends before the input does."""
    if q_length == 1 and isinstance(q_offset, Tensor) and q_offset.device.type != "cpu":
        return  # a decode step on a GPU: to look would be to wait
    if attention_mask.shape[-1] < int(q_offset) + q_length:
        raise SqueezedError(
            f"attention_mask: expected one entry for each of {int(q_offset)} tokens held, with the "
            f"document's, and of {q_length} new ones, got {attention_mask.shape[-1]}; pass "
            "suffix_mask(cache.get_seq_length(), ...)"
        )


AttentionInterface.register(NAME, squeezed_attention_forward)
AttentionMaskInterface.register(NAME, squeezed_mask)
