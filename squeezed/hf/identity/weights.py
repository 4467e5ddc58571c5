"""What a model computes with: its decoder's weights, adapters counted in, and frequencies.

Names are those of the decoder alone, whatever wraps it, its layers or single weights: adapters,
`torch.compile`, trained copies of a module.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from squeezed.hf.identity.adapters import (
    Wrapper,
    adding_adapters,
    base_layer,
    in_use,
    is_adapted,
    is_plain_lora,
    measured,
    refuse_virtual_tokens,
    unwrapped,
)
from squeezed.hf.identity.sketch import ROUNDINGS, Products

if TYPE_CHECKING:
    from transformers import PreTrainedModel

READ_FROM_DISK = 1 << 20
"""Elements up to which a weight that was offloaded to disk is read."""

INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)

PLAIN, ADAPTED, MEASURED, BUFFER, PACKED = "plain", "adapted", "measured", "buffer", "packed"
KINDS = frozenset((PLAIN, ADAPTED, MEASURED, BUFFER, PACKED))


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
    if part.kind != MEASURED and is_plain_lora(tuner):
        return replace(part, kind=ADAPTED, adapters=(*part.adapters, tuner))
    if isinstance(in_use(tuner.base_layer), nn.Linear):
        return replace(part, kind=MEASURED, adapters=(*part.adapters, tuner))
    return replace(part, tensor=None)


def added(part: Part) -> Products | None:
    """What the adapters of a part add to its products, as a function of the directions."""
    tensor = part.tensor
    if not part.adapters or tensor is None:
        return None
    rows = tensor.shape[0] if tensor.dim() else 1
    flat = tensor.reshape(rows, -1).shape

    def products(directions: Tensor) -> Tensor:
        if part.kind == MEASURED:
            return measured(part.adapters[-1], directions, tensor.dtype)
        total = torch.zeros(flat[0], len(directions), device=directions.device)
        for tuner in part.adapters:
            for name in adding_adapters(tuner):
                delta = tuner.get_delta_weight(name).reshape(flat).float()
                total += (delta[:, None, :] * directions).sum(2)
        return total

    return products
