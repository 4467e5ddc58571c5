"""A few tokens through the model, to find what it does with keys before a document is read.

A model is refused here by what it does, whatever its name: keys and values of different widths,
masks of its own, keys that it looks at behind the cache, layers that keep none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from squeezed.errors import SqueezedError, UnsupportedModelError
from squeezed.hf.capture import CaptureLayer
from squeezed.hf.support import LayerKind, input_device, text_config, unsupported
from squeezed.hf.switch import using_attention

TOKENS, PARTS = 8, 2
"""Read in parts: the second finds keys in the cache, as every question will."""


class RehearsalLayer(CaptureLayer):
    """A full-attention layer that raises `_Refused` for what no cache of ours can answer."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        key, value = tuple(key_states.shape), tuple(value_states.shape)
        if key[-1] != value[-1]:
            raise _Refused(f"keys of {key[-1]} dimensions with values of {value[-1]}")
        if key != value or key[0] != 1:
            raise _Refused(f"keys of shape {list(key)} with values of shape {list(value)}")
        return super().update(key_states, value_states, *args, **kwargs)

    def answer(self, query: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        heads, dim = self.keys.shape[1], self.keys.shape[3]
        if query.shape[3] != dim or query.shape[1] % heads:
            raise _Refused(
                f"{query.shape[1]} query heads of {query.shape[3]} dimensions with {heads} key "
                f"heads of {dim}"
            )
        if mask is not None and not _is_causal(mask, query.shape[2]):
            raise _Refused("an attention mask of its own")
        return super().answer(query, mask, scale)


class _Refused(Exception):
    """What a model has that cannot be squeezed."""


def _is_causal(mask: Tensor, rows: int) -> bool:
    """Whether the mask of `rows` new tokens `[..., Q, Q]` is the plain one."""
    if mask.dtype != torch.bool or mask.shape[-2:] != (rows, rows):
        return False
    return bool((mask == torch.ones_like(mask).tril()).all())


@torch.inference_mode()
def rehearse(model: PreTrainedModel, kinds: list[LayerKind], tokens: Tensor) -> None:
    """Let `model` read the first of `tokens` `[P]` through a cache that looks on.

    Raises:
        UnsupportedModelError: attention that cannot be squeezed, or none at all, with the reason.
    """
    config, part = text_config(model), tokens[None, :TOKENS].to(input_device(model))
    layers = [
        DynamicSlidingWindowLayer(kind.sliding_window)
        if kind.sliding_window
        else RehearsalLayer(part.shape[1], 0)
        for kind in kinds
    ]
    cache = Cache(layers=layers)
    try:
        with using_attention(model):
            for ids in part.tensor_split(PARTS, 1):
                if ids.shape[1]:
                    model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    except _Refused as refused:
        raise unsupported(config, str(refused)) from None
    except (UnsupportedModelError, torch.OutOfMemoryError):
        raise
    except SqueezedError as error:
        reason = "code of its own between cache and attention"
        raise unsupported(config, reason) from error
    except Exception as error:
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise UnsupportedModelError(
            f"model type {config.model_type!r} cannot read tokens through a squeezed cache "
            f"({cause}); use a Llama-, Mistral-, Qwen- or Gemma-3-style model"
        ) from error
    for place, layer in enumerate(layers):
        if layer.get_seq_length() != part.shape[1]:
            raise unsupported(config, f"a layer {place} that keeps no keys of what it reads")
        if isinstance(layer, CaptureLayer) and not layer.scales:
            raise unsupported(config, f"a layer {place} whose keys no attention function reads")
        if isinstance(layer, CaptureLayer) and len(layer.scales) > 1:
            raise unsupported(config, f"layers that read the keys of layer {place} at other scales")
