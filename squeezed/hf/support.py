"""Which models can be squeezed, what their layers are, and switching attention on and off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from squeezed.errors import UnsupportedModelError
from squeezed.hf.attention import NAME

UNSUPPORTED_TYPES = {
    "gemma2": "soft-capped attention logits",
    "gpt_oss": "learned attention sinks",
    "deepseek_v2": "multi-head latent attention",
    "deepseek_v3": "multi-head latent attention",
    "mllama": "cross attention",
}


@dataclass(frozen=True)
class LayerKind:
    """`sliding_window` in tokens, `None` for full attention."""

    sliding_window: int | None


def text_config(model):
    """The configuration of the language model inside `model`."""
    return model.config.get_text_config(decoder=True)


def layer_kinds(model) -> list[LayerKind]:
    """Kind of every attention layer; raises `UnsupportedModelError` with the reason."""
    config = text_config(model)
    refuse(model, config)
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if types is None:
        sliding = window if window and getattr(config, "use_sliding_window", True) else None
        types = ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers
    kinds = []
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(
                f"model type {config.model_type!r} has {kind!r} layers; only full and "
                "sliding-window attention can be squeezed"
            )
        kinds.append(LayerKind(window if kind == "sliding_attention" else None))
    if all(kind.sliding_window for kind in kinds):
        raise UnsupportedModelError(
            f"every layer of this {config.model_type!r} model slides over {window} tokens: it "
            "never reads a long context, so there is nothing to squeeze"
        )
    return kinds


def refuse(model, config) -> None:
    """Raise `UnsupportedModelError` for attention that this package does not reproduce."""
    reason = UNSUPPORTED_TYPES.get(config.model_type)
    if getattr(model.config, "is_encoder_decoder", False):
        reason = "an encoder and a decoder"
    elif getattr(config, "attn_logit_softcapping", None):
        reason = "soft-capped attention logits"
    elif (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "dynamic":
        reason = "rotary frequencies that change with the length of the input"
    elif not getattr(model, "_supports_attention_backend", False):
        reason = "its own attention code instead of Transformers' attention interface"
    if reason:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} has {reason}, which squeezed attention does not "
            "reproduce; use a Llama-, Mistral-, Qwen- or Gemma-3-style model"
        )


@contextmanager
def using_attention(model, name: str = NAME) -> Iterator[None]:
    """Run the block with another attention implementation; the model's own comes back after it."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
