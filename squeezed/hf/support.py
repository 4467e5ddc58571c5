"""Which models can be squeezed, and what their layers are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from squeezed.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

UNSUPPORTED_TYPES = {
    "gemma2": "soft-capped attention logits",
    "gpt_oss": "learned attention sinks",
    "deepseek_v2": "multi-head latent attention",
    "deepseek_v3": "multi-head latent attention",
    "mllama": "cross attention",
}


@dataclass(frozen=True)
class LayerKind:
    """A layer with keys of its own.

    Attributes:
        sliding_window: in tokens, `None` for full attention.
        readers: layers that attend to its keys: itself, and those that have none of their own.
    """

    sliding_window: int | None
    readers: int = 1


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The configuration of the language model inside `model`."""
    return model.config.get_text_config(decoder=True)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids belong, also if the weights wait elsewhere until they are needed."""
    embedding = model.get_input_embeddings()
    offloaded = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    if offloaded is not None:
        return torch.device(offloaded)
    weight = next(embedding.parameters(), None)
    return model.device if weight is None else weight.device


def layer_kinds(model: PreTrainedModel) -> list[LayerKind]:
    """Kind of every layer that has keys; raises `UnsupportedModelError` with the reason.

    Layers that read an earlier layer's keys (Gemma 3n, Gemma 4) have no place in a cache.
    """
    config = text_config(model)
    refuse(model, config)
    window = getattr(config, "sliding_window", None)
    longest = getattr(config, "max_position_embeddings", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        slides = window and getattr(config, "use_sliding_window", True)
        slides = slides and not (longest and window >= longest)
        types = ["sliding_attention" if slides else "full_attention"] * config.num_hidden_layers
    unknown = next((x for x in types if x not in ("full_attention", "sliding_attention")), None)
    if unknown is not None:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} has {unknown!r} layers; only full and "
            "sliding-window attention can be squeezed"
        )
    kinds = [
        LayerKind(window if types[place] == "sliding_attention" else None, readers)
        for place, readers in _readers(config, types).items()
    ]
    if all(kind.sliding_window for kind in kinds):
        raise UnsupportedModelError(
            f"every layer of this {config.model_type!r} model slides over {window} tokens: it "
            "never reads a long context, so there is nothing to squeeze"
        )
    return kinds


def _readers(config: PreTrainedConfig, types: list[str]) -> dict[int, int]:
    """Place of every layer with keys of its own -> how many layers read them."""
    modes = getattr(config, "kv_sharing_modes", None) or [None] * len(types)
    readers: dict[int, int] = {}
    for place, mode in enumerate(modes):
        if mode in (None, "store"):
            if len(readers) != place:
                break
            readers[place] = 1
        elif mode == "reuse":
            owner = next(x for x in readers if modes[x] == "store" and types[x] == types[place])
            readers[owner] += 1
        else:
            break
    else:
        return readers
    raise UnsupportedModelError(
        f"model type {config.model_type!r} shares keys between layers in a way that is not known "
        f"here ({mode!r} in layer {place}); use a Llama-, Mistral-, Qwen- or Gemma-style model"
    )


def refuse(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Raise `UnsupportedModelError` for attention that this package does not reproduce.

    What only shows when the model runs is found by `squeezed.hf.rehearsal`.
    """
    reason = UNSUPPORTED_TYPES.get(config.model_type)
    if getattr(model.config, "is_encoder_decoder", False):
        reason = "an encoder and a decoder"
    elif getattr(config, "attn_logit_softcapping", None):
        reason = "soft-capped attention logits"
    elif not getattr(model, "_supports_attention_backend", False):
        reason = "its own attention code instead of Transformers' attention interface"
    if reason:
        raise unsupported(config, reason)


def unsupported(config: PreTrainedConfig, reason: str) -> UnsupportedModelError:
    """The refusal of a model that has `reason`."""
    return UnsupportedModelError(
        f"model type {config.model_type!r} has {reason}, which squeezed attention does not "
        "reproduce; use a Llama-, Mistral-, Qwen- or Gemma-3-style model"
    )
