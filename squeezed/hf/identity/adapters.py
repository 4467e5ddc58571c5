"""Adapters and other wrappers around modules: what computes, and what is added to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from squeezed.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Wrapper = Any
"""A module of PEFT, told by its attributes: the library is not needed."""

Module = TypeVar("Module", bound=nn.Module)


def unwrapped(module: Module) -> Module:
    """The module below `torch.compile`'s wrapper."""
    return getattr(module, "_orig_mod", module)


def refuse_virtual_tokens(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` for adapters that put virtual tokens before the prompt."""
    model = unwrapped(model)
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or getattr(model, "_adapters_disabled", False) is True:
        return
    active = getattr(model, "active_adapter", None)
    for name in [active] if isinstance(active, str) else list(configs):
        config: Any = configs.get(name)
        virtual = getattr(config, "is_prompt_learning", False)
        if virtual or getattr(config, "is_adaption_prompt", False):
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise UnsupportedModelError(
                f"model: adapter {name!r} ({kind}) puts virtual tokens before the prompt, which a "
                "fixed context does not hold; disable it, or use one that changes weights, as LoRA"
            )


def is_adapted(module: nn.Module) -> bool:
    """Whether it is PEFT's wrapper of another module."""
    return hasattr(module, "base_layer") and hasattr(module, "active_adapters")


def base_layer(tuner: Wrapper) -> nn.Module:
    return tuner.base_layer


def in_use(module: nn.Module) -> nn.Module:
    """The module that computes: below a compiled one, or the trained copy that is switched on."""
    wrapper: Wrapper = unwrapped(module)
    for original, copies in (("original_module", "modules_to_save"), TUNED_NORM):
        if hasattr(wrapper, original) and hasattr(wrapper, copies):
            found = getattr(wrapper, copies)
            names = [name for name in wrapper.active_adapters if name in found]
            merged = getattr(wrapper, "merged", False)
            disabled = wrapper.disable_adapters or merged or not names
            return in_use(getattr(wrapper, original) if disabled else found[names[0]])
    return wrapper


TUNED_NORM = ("base_layer", "ln_tuning_layers")


def adding_adapters(tuner: Wrapper) -> list[str]:
    """Active adapters whose effect is not yet in the weight."""
    if tuner.disable_adapters:
        return []
    holding = {key for name in tuner.adapter_layer_names for key in _keys(tuner, name)}
    return [a for a in tuner.active_adapters if a in holding and a not in tuner.merged_adapters]


def _keys(tuner: Wrapper, name: str) -> list[str]:
    held: Any = getattr(tuner, name, None)
    return list(held.keys()) if hasattr(held, "keys") else []


def is_plain_lora(tuner: Wrapper) -> bool:
    """Whether all that the active adapters do is to add a product of two matrices."""
    lora = hasattr(tuner, "lora_A") and hasattr(tuner, "get_delta_weight")
    variants = getattr(tuner, "lora_variant", {})
    return lora and not any(
        name in variants
        or getattr(getattr(tuner.lora_B, name, None), "bias", None) is not None
        or getattr(tuner, "use_dora", {}).get(name, False)
        for name in adding_adapters(tuner)
    )


def measured(tuner: Wrapper, directions: Tensor, dtype: torch.dtype) -> Tensor:
    """`[rows, directions]` float32, what a wrapper's outputs have more than its base's."""
    inputs = directions.to(dtype)
    was_training = [module for module in tuner.modules() if module.training]
    tuner.eval()
    try:
        return (tuner(inputs).float() - tuner.base_layer(inputs).float()).T
    finally:
        for module in was_training:
            module.training = True
