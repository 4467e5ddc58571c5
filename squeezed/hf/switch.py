"""Switching a model's attention on and off, also while threads and sessions share the model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Condition, get_ident
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from squeezed.errors import SqueezedError
from squeezed.hf.attention import NAME
from squeezed.system.forks import Turns, renew_in_children


@contextmanager
def using_attention(model: PreTrainedModel, name: str = NAME) -> Iterator[None]:
    """Run the block with another attention implementation, in evaluation mode.

    Both come back as they were, module by module, when the last block on the model ends, in
    whatever thread. Blocks with one name run side by side; one with another name waits for them.

    Raises:
        SqueezedError: a block inside another asks for another name while other threads are at work,
            or a session holds the model.
    """
    inner, thread = _inner(model), get_ident()
    switch = _switch_of(inner)
    switch.enter(inner, name, thread)
    try:
        yield
    finally:
        switch.leave(inner, name, thread)


def hold_attention(model: PreTrainedModel, name: str = NAME) -> Callable[[], None]:
    """Switch as `using_attention` does until the returned function is called, from any thread."""
    inner, session = _inner(model), _Session()
    switch = _switch_of(inner)
    switch.enter(inner, name, session)
    return partial(switch.leave, inner, name, session)


class _Session:
    """Who holds a model for longer than a block."""


def _inner(model: PreTrainedModel) -> PreTrainedModel:
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


@dataclass(eq=False)
class _Switch:
    """Who works on a model under which attention, and how the model was before all of them.

    Attributes:
        names: by thread or session, the attention implementations it asked for, the last on top.
        configs: every configuration in the model, with its implementation.
        training: the modules that were in training mode.
    """

    changed: Condition = field(default_factory=Condition)
    names: dict[Hashable, list[str]] = field(default_factory=dict)
    configs: list[tuple[PreTrainedConfig, str | None]] = field(default_factory=list)
    training: list[nn.Module] = field(default_factory=list)
    current: str | None = None

    def enter(self, model: PreTrainedModel, name: str, who: Hashable) -> None:
        with self.changed:
            while others := self._others(name, who):
                if who in self.names or any(isinstance(other, _Session) for other in others):
                    raise SqueezedError(
                        f"attention {name!r}: a session or another thread works on this model with "
                        f"{self.current!r}; wait for its end, or use a second copy of the model"
                    )
                self.changed.wait()
            if not self.names:
                self._remember(model)
            self.names.setdefault(who, []).append(name)
            try:
                self._set(model, name)
            except BaseException:
                self._leave(model, name, who)
                raise

    def __post_init__(self) -> None:
        renew_in_children(self)

    def begin_again(self) -> None:
        """Only the forking thread, and sessions, are at work in a child."""
        self.changed = Condition()
        there = get_ident()
        held = bool(self.names)
        self.names = {w: n for w, n in self.names.items() if w == there or isinstance(w, _Session)}
        if held and not self.names:
            self._restore()

    def leave(self, model: PreTrainedModel, name: str, who: Hashable) -> None:
        with self.changed:
            self._leave(model, name, who)

    def _others(self, name: str, who: Hashable) -> list[Hashable]:
        """Who else is at work, with another attention."""
        return [other for other, names in self.names.items() if other != who and names[-1] != name]

    def _leave(self, model: PreTrainedModel, name: str, who: Hashable) -> None:
        names = self.names[who]
        del names[len(names) - 1 - names[::-1].index(name)]
        if not names:
            del self.names[who]
        if self.names:
            self._set(model, self.names.get(who, next(iter(self.names.values())))[-1])
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
_ONE_LOOK = Turns()


def _switch_of(model: PreTrainedModel) -> _Switch:
    with _ONE_LOOK:
        return _SWITCHES.setdefault(model, _Switch())


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
