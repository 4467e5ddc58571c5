"""The attention and mask functions that `model.set_attn_implementation("squeezed")` selects.

Transformers does not pass the cache to an attention function. So a squeezed cache layer returns a
`Handover` from `update()` in place of keys and values, and the function below lets it answer. Any
other attention function that receives a `Handover` fails with the remedy instead of attending to
half of the keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from squeezed.errors import SqueezedError, UnsupportedModelError

NAME = "squeezed"

REMEDY = (
    'a squeezed cache needs the squeezed attention function: call model.set_attn_implementation("'
    f'{NAME}") first'
)

Attend = Callable[[Tensor, "Tensor | None", float], Tensor]


class Handover:
    """Stands in for the keys and values of a layer; only `squeezed_attention_forward` opens it."""

    def __init__(self, attend: Attend) -> None:
        self.attend = attend

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise SqueezedError(REMEDY)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise SqueezedError(REMEDY)


def squeezed_attention_forward(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs
):
    """Attention as Transformers calls it: `query [B, Hq, Q, D]` -> `([B, Q, Hq, D], None)`.

    With an ordinary cache, or none, this is scaled-dot-product attention.
    """
    if not isinstance(key, Handover):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    refuse_unsupported(module, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return key.attend(query, attention_mask, scale).transpose(1, 2), None


def refuse_unsupported(module, kwargs: dict[str, Any]) -> None:
    """Raise for arguments that change the attention formula in a way we do not reproduce."""
    for name, what in (
        ("softcap", "soft-capped logits"),
        ("s_aux", "learned attention sinks"),
        ("position_bias", "a position bias"),
    ):
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} uses {what}, which squeezed attention does not "
                "reproduce; use a model without them, or dense attention"
            )


AttentionInterface.register(NAME, squeezed_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
