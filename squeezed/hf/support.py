"""Which models can be squeezed, what their layers are, and switching attention on and off."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Condition, Lock, get_ident
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from squeezed.errors import SqueezedError, UnsupportedModelError

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


def text_config(model):
    """The configuration of the language model inside `model`."""
    return model.config.get_text_config(decoder=True)


def input_device(model) -> torch.device:
    """Where token ids belong, also if the weights wait elsewhere until they are needed."""
    embedding = model.get_input_embeddings()
    offloaded = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    if offloaded is not None:
        return torch.device(offloaded)
    weight = next(embedding.parameters(), None)
    return model.device if weight is None else weight.device


def layer_kinds(model) -> list[LayerKind]:
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


def _readers(config, types: list[str]) -> dict[int, int]:
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


def refuse(model, config) -> None:
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


def unsupported(config, reason: str) -> UnsupportedModelError:
    """The refusal of a model that has `reason`."""
    return UnsupportedModelError(
        f"model type {config.model_type!r} has {reason}, which squeezed attention does not "
        "reproduce; use a Llama-, Mistral-, Qwen- or Gemma-3-style model"
    )


@dataclass
class _Switch:
    """Who works on a model under which attention, and how the model was before all of them.

    Attributes:
        names: by thread, the attention implementations it asked for, the last one on top.
        configs: every configuration in the model, with its implementation.
        training: the modules that were in training mode.
    """

    changed: Condition = field(default_factory=Condition)
    names: dict[int, list[str]] = field(default_factory=dict)
    configs: list[tuple[object, object]] = field(default_factory=list)
    training: list[nn.Module] = field(default_factory=list)
    current: str | None = None

    def enter(self, model: PreTrainedModel, name: str) -> None:
        own = get_ident()
        with self.changed:
            while any(names[-1] != name for thread, names in self.names.items() if thread != own):
                if own in self.names:
                    raise SqueezedError(
                        f"attention {name!r}: another thread works on this model with "
                        f"{self.current!r}; wait for it, or use a second copy of the model"
                    )
                self.changed.wait()
            if not self.names:
                self._remember(model)
            self.names.setdefault(own, []).append(name)
            try:
                self._set(model, name)
            except BaseException:
                self._leave(model, own, name)
                raise

    def leave(self, model: PreTrainedModel, thread: int, name: str) -> None:
        with self.changed:
            self._leave(model, thread, name)

    def _leave(self, model: PreTrainedModel, thread: int, name: str) -> None:
        names = self.names[thread]
        del names[len(names) - 1 - names[::-1].index(name)]
        if not names:
            del self.names[thread]
        if self.names:
            self._set(model, self.names.get(thread, next(iter(self.names.values())))[-1])
        else:
            self._restore()
        self.changed.notify_all()

    def _set(self, model: PreTrainedModel, name: str) -> None:
        if name != self.current:
            model.set_attn_implementation(name)
            self.current = name

    def _remember(self, model: PreTrainedModel) -> None:
        self.configs = [(each, each._attn_implementation_internal) for each in _configs(model)]
        self.training = [module for module in model.modules() if module.training]
        for module in self.training:
            module.training = False

    def _restore(self) -> None:
        for config, implementation in self.configs:
            config._attn_implementation_internal = implementation
        for module in self.training:
            module.training = True
        self.configs, self.training, self.current = [], [], None


_SWITCHES: WeakKeyDictionary[PreTrainedModel, _Switch] = WeakKeyDictionary()
_ONE_LOOK = Lock()


def _configs(model: PreTrainedModel) -> list:
    """Every configuration that says which attention a part of the model uses, each once."""
    found = {}
    waiting = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    while waiting:
        config = waiting.pop()
        if config is not None and id(config) not in found:
            found[id(config)] = config
            waiting += [getattr(config, name, None) for name in config.sub_configs]
    return list(found.values())
