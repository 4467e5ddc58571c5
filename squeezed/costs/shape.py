"""What a configuration says about a model: layers, heads, dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from squeezed.config import RowsName
from squeezed.context.bytes import LayerBytes
from squeezed.errors import SqueezedError, whole
from squeezed.system.failures import cause_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from squeezed.hf.support import LayerKind


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides the cost of its context.

    Attributes:
        full_layers: layers with full attention; `window_layers` slide over `window` tokens.
        heads, kv_heads, head_dim: of one layer.
        element_bytes: of a key's number; 2 for bfloat16.
        parameters: weights read for every generated token.
    """

    full_layers: int
    window_layers: int
    window: int
    heads: int
    kv_heads: int
    head_dim: int
    element_bytes: int
    parameters: int

    def bytes(self, rows: RowsName = "plain") -> LayerBytes:
        """Bytes of the parts of a layer, whose keys and values are written so."""
        return LayerBytes.written(self.head_dim, self.element_bytes, rows)


def model_shape(config: PreTrainedConfig, element_bytes: int | None = None) -> ModelShape:
    """Read a Transformers configuration; counts its weights on the meta device.

    Raises:
        SqueezedError: the configuration describes no decoder with attention.
        UnsupportedModelError: attention that cannot be squeezed.
    """
    from transformers import AutoModelForCausalLM

    from squeezed.hf.support import layer_kinds, text_config

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of any kind, for a configuration that holds nonsense
        raise SqueezedError(
            f"model: {type(config).__name__} describes no causal language model "
            f"({cause_of(error)}); name a decoder such as Llama, Qwen, Mistral or Gemma 3"
        ) from error
    kinds = layer_kinds(model)
    text = text_config(model)
    attention = _full_attention(text, kinds)
    _check_heads(attention)
    windows = [kind.sliding_window for kind in kinds if kind.sliding_window]
    heads = attention.num_attention_heads
    dtype = getattr(text, "dtype", None) or torch.bfloat16
    return ModelShape(
        full_layers=len(kinds) - len(windows),
        window_layers=len(windows),
        window=max(windows, default=0),
        heads=heads,
        kv_heads=getattr(attention, "num_key_value_heads", None) or heads,
        head_dim=getattr(attention, "head_dim", None) or attention.hidden_size // heads,
        element_bytes=element_bytes or dtype.itemsize,
        parameters=sum(weight.numel() for weight in model.parameters()),
    )


def _full_attention(config: PreTrainedConfig, kinds: Sequence[LayerKind]) -> PreTrainedConfig:
    """The configuration as the first layer with full attention has it: Gemma 4's differ."""
    place = next(place for place, kind in enumerate(kinds) if not kind.sliding_window)
    layers = getattr(config, "per_layer_config", None)
    return layers[place] if layers else config


def _check_heads(config: PreTrainedConfig) -> None:
    """Raise `SqueezedError` for a configuration whose attention has no consistent shape."""
    heads = whole("model: num_attention_heads", config.num_attention_heads, 1)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % whole("model: num_key_value_heads", kv_heads, 1):
        raise SqueezedError(
            f"model: {heads} heads cannot share {kv_heads} KV heads evenly; check its config.json"
        )
    whole("model: num_hidden_layers", config.num_hidden_layers, 1)
    whole("model: head_dim", getattr(config, "head_dim", None) or config.hidden_size // heads, 1)
