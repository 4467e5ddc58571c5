"""What a model computes with: its decoder's weights, adapters counted in, and frequencies.

Names are those of the decoder alone, whatever wraps it, its layers or single weights: adapters,
`torch.compile`, trained copies of a module.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from squeezed.errors import UnsupportedModelError
from squeezed.hf.identity.sketch import ROUNDINGS, Products, Sketch, sketch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CACHED = 1 << 16
"""Elements from which a weight is sketched again only if something says that it changed."""

READ_FROM_DISK = 1 << 20
"""Elements up to which a weight that was offloaded to disk is read."""

INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)

PLAIN, ADAPTED, MEASURED, BUFFER, PACKED = "plain", "adapted", "measured", "buffer", "packed"

Wrapper = Any
"""A module of PEFT, told by its attributes: the library is not needed."""

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Part:
    """One tensor that the decoder computes with.

    Attributes:
        owner, key: the module that holds it, and its name there.
        name: its name in the decoder.
        tensor: `None` where it cannot be read: on disk, or stored in a form of a library's own.
        kind: `plain`; `adapted`, an adapter adds to it; `measured`, that could only be measured by
            running the module; `buffer`; `packed`, integers that stand for weights.
        adapters: the modules that add to it.
    """

    owner: nn.Module
    key: str
    name: str
    tensor: Tensor | None
    kind: str
    adapters: tuple[Wrapper, ...] = ()


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The language model inside `model`, without its head; refuses virtual tokens in one line."""
    refuse_virtual_tokens(model)
    model = unwrapped(model)
    found = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    return unwrapped(found)


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


def parts(module: nn.Module, prefix: str = "") -> Iterator[Part]:
    """Every tensor that `module` and its submodules compute with, by name."""
    module = in_use(module)
    if is_adapted(module):
        yield from _adapted(module, prefix)
        return
    yield from _own(module, prefix)
    for name, child in module.named_children():
        yield from parts(child, f"{prefix}{name}.")


def modules_in_use(module: nn.Module) -> Iterator[nn.Module]:
    """`module` and its submodules, but for adapters and for what they replace."""
    module = in_use(module)
    if is_adapted(module):
        yield from modules_in_use(base_layer(module))
        return
    yield module
    for child in module.children():
        yield from modules_in_use(child)


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


def _own(module: nn.Module, prefix: str) -> Iterator[Part]:
    for key, tensor in module._parameters.items():
        if tensor is not None:
            yield _part(module, key, prefix, tensor, PLAIN)
    for key, buffer in module._buffers.items():
        if buffer is None or (key == "inv_freq" and follows_length(module)):
            continue
        if buffer.dtype in INTEGERS and key in module._non_persistent_buffers_set:
            continue
        yield _part(module, key, prefix, buffer, BUFFER)


def _part(module: nn.Module, key: str, prefix: str, tensor: Tensor, kind: str) -> Part:
    """Read from where it was offloaded to; a form of a library's own counts as packed."""
    if tensor.is_meta:
        tensor = _offloaded(module, key, tensor)
    plain = type(tensor) in (Tensor, nn.Parameter)
    if tensor.dtype in INTEGERS or not (plain and (tensor.dtype in ROUNDINGS or tensor.is_meta)):
        kind = PACKED
    readable = plain and not tensor.is_meta and tensor.dtype in (*ROUNDINGS, *INTEGERS)
    return Part(module, key, prefix + key, tensor if readable else None, kind)


def _offloaded(module: nn.Module, key: str, tensor: Tensor) -> Tensor:
    """What an offloaded tensor holds if it lies in memory, or is small; otherwise itself."""
    hook = getattr(module, "_hf_hook", None)
    for single in getattr(hook, "hooks", (hook,)):
        weights = getattr(single, "weights_map", None)
        if weights is None:
            continue
        name = getattr(weights, "prefix", "") + key
        loader = getattr(weights, "dataset", weights)
        in_memory = name in getattr(loader, "state_dict", loader)
        if in_memory or (name in loader and tensor.numel() <= READ_FROM_DISK):
            return loader[name]
    return tensor


def follows_length(module: nn.Module) -> bool:
    """Whether every forward pass writes these frequencies anew, for the length of its input."""
    return getattr(module, "rope_type", None) in ("longrope", "dynamic")


def _adapted(tuner: Wrapper, prefix: str) -> Iterator[Part]:
    """The parts of a module that an adapter wraps; to one of them the adapter adds something."""
    target = prefix + getattr(tuner, "parameter_name", "weight")
    adding = adding_adapters(tuner)
    for part in parts(tuner.base_layer, prefix):
        if part.name == target and adding and part.tensor is not None:
            part = _with_adapter(part, tuner, adding)
        yield part


def _with_adapter(part: Part, tuner: Wrapper, adding: list[str]) -> Part:
    if hasattr(tuner, "get_merged_weights"):  # rows of an embedding, trained
        return replace(part, tensor=tuner.get_merged_weights(adding))
    if part.kind != MEASURED and _is_plain_lora(tuner):
        return replace(part, kind=ADAPTED, adapters=(*part.adapters, tuner))
    if isinstance(in_use(tuner.base_layer), nn.Linear):
        return replace(part, kind=MEASURED, adapters=(*part.adapters, tuner))
    return replace(part, tensor=None)


def adding_adapters(tuner: Wrapper) -> list[str]:
    """Active adapters whose effect is not yet in the weight."""
    if tuner.disable_adapters:
        return []
    holding = {key for name in tuner.adapter_layer_names for key in _keys(tuner, name)}
    return [a for a in tuner.active_adapters if a in holding and a not in tuner.merged_adapters]


def _keys(tuner: Wrapper, name: str) -> list[str]:
    held: Any = getattr(tuner, name, None)
    return list(held.keys()) if hasattr(held, "keys") else []


def _is_plain_lora(tuner: Wrapper) -> bool:
    """Whether all that the active adapters do is to add a product of two matrices."""
    lora = hasattr(tuner, "lora_A") and hasattr(tuner, "get_delta_weight")
    variants = getattr(tuner, "lora_variant", {})
    return lora and not any(
        name in variants
        or getattr(getattr(tuner.lora_B, name, None), "bias", None) is not None
        or getattr(tuner, "use_dora", {}).get(name, False)
        for name in adding_adapters(tuner)
    )


def added(part: Part) -> Products | None:
    """What the adapters of a part add to its products, as a function of the directions."""
    tensor = part.tensor
    if not part.adapters or tensor is None:
        return None
    rows = tensor.shape[0] if tensor.dim() else 1
    flat = tensor.reshape(rows, -1).shape

    def products(directions: Tensor) -> Tensor:
        if part.kind == MEASURED:
            return _measured(part.adapters[-1], directions, tensor.dtype)
        total = torch.zeros(flat[0], len(directions), device=directions.device)
        for tuner in part.adapters:
            for name in adding_adapters(tuner):
                delta = tuner.get_delta_weight(name).reshape(flat).float()
                total += (delta[:, None, :] * directions).sum(2)
        return total

    return products


def _measured(tuner: Wrapper, directions: Tensor, dtype: torch.dtype) -> Tensor:
    inputs = directions.to(dtype)
    was_training = [module for module in tuner.modules() if module.training]
    tuner.eval()
    try:
        return (tuner(inputs).float() - tuner.base_layer(inputs).float()).T
    finally:
        for module in was_training:
            module.training = True


def state(part: Part) -> tuple:
    """Changes whenever a part is replaced, edited in place, or adapted in another way."""
    tensors = [part.tensor] if part.tensor is not None else []
    settings = []
    for tuner in part.adapters:
        tensors += [p for p in tuner.parameters() if not p.is_meta]
        settings.append((adding_adapters(tuner), repr(getattr(tuner, "scaling", None))))
    return (part.kind, repr(settings), *(_tensor_state(tensor) for tensor in tensors))


def _tensor_state(tensor: Tensor) -> tuple:
    """Address, version, and a few elements, for edits through `.data` leave the version alone."""
    flat = tensor.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // 64) | 1]
    version = 0 if tensor.is_inference() else tensor._version
    return (tensor.data_ptr(), version, tuple(tensor.shape), tuple(sample.tolist()))


def model_state(decoder: nn.Module) -> tuple:
    """Changes whenever a part of the decoder does, or a setting, a hook or a method of a module."""
    return (
        *(state(part) for part in parts(decoder)),
        *(_module_state(module) for module in decoder.modules()),
    )


def _module_state(module: nn.Module) -> tuple:
    own = [cls for cls in type(module).__mro__ if cls.__module__.split(".")[0] not in LIBRARIES]
    settings = [item for held in (*own, module) for item in vars(held).items()]
    return (
        len(module._forward_hooks),
        len(module._forward_pre_hooks),
        *((n, repr(v)) for n, v in settings if n[:2] != "__" and _is_setting(v)),
        *((n, id(v)) for n, v in settings if callable(v) and n == "forward"),
    )


SCALARS = (bool, int, float, str)


def _is_setting(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(item, SCALARS) for item in value)
    return isinstance(value, SCALARS)  # asked for everything that a module holds: keep it quick


LIBRARIES = ("torch", "transformers", "peft", "builtins", "abc", "typing")

_sketched: WeakKeyDictionary = WeakKeyDictionary()


@torch.no_grad()
def sketched(part: Part, rounded: bool, rows: int | None = None) -> Sketch:
    """The sketch of a part, or of its first `rows` rows; large ones are kept while unchanged."""
    assert part.tensor is not None
    wanted = (state(part), rounded, rows) if part.tensor.numel() >= CACHED else None
    kept = _sketched.setdefault(part.owner, {})
    if wanted and kept.get((part.key, rounded), (None,))[0] == wanted:
        return kept[part.key, rounded][1]
    tensor = part.tensor if rows is None else part.tensor[:rows]
    made = sketch(
        tensor,
        ROUNDINGS.get(tensor.dtype, ()) if rounded and not part.adapters else (),
        logarithm=part.key.endswith("inv_freq"),
        change=added(part) if rows is None else None,
    )
    kept[part.key, rounded] = (wanted, made)
    return made
