"""Has a model changed since it was looked at? Cheap: asked before every answer."""

from __future__ import annotations

from torch import Tensor, nn

from squeezed.hf.identity.adapters import adding_adapters
from squeezed.hf.identity.weights import Part, parts


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
