"""Methods of sparse attention over a fixed context, behind one interface."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from squeezed.config import PRESETS
from squeezed.errors import SqueezedError, expect
from squeezed.methods.base import ContextAttention, Method
from squeezed.methods.dense import Dense
from squeezed.methods.lazyllm import LazyLLM
from squeezed.methods.multipole import Multipole
from squeezed.methods.oracle import Oracle
from squeezed.methods.quest import Quest
from squeezed.methods.random import Random
from squeezed.methods.retrieval import Retrieval
from squeezed.methods.routing import Routing
from squeezed.methods.snapkv import SnapKV
from squeezed.methods.squeezed import Squeezed
from squeezed.methods.streaming import Streaming

METHODS: dict[str, type[Method]] = {
    cls.name: cls
    for cls in (
        Squeezed,
        Dense,
        Quest,
        SnapKV,
        Streaming,
        Retrieval,
        Routing,
        Multipole,
        LazyLLM,
        Oracle,
        Random,
    )
}

ALIASES: dict[str, tuple[str, dict]] = {
    preset: (Squeezed.name, {"preset": preset}) for preset in PRESETS
}
"""Names that stand for a method with settings: every preset of squeezed attention."""

__all__ = ["ALIASES", "METHODS", "ContextAttention", "Method", "create"]


def create(name: str, **settings: Any) -> Method:
    """Make a method by its name or alias with those of `settings` that it has.

    Raises:
        SqueezedError: no method of that name.
    """
    expect("method", name, str, "a method's name (str)")
    known_as, fixed = ALIASES.get(name, (name, {}))
    if known_as not in METHODS:
        known = ", ".join([*METHODS, *ALIASES])
        raise SqueezedError(f"method: expected one of {known}, got {name!r}; see squeezed.methods")
    chosen: Any = METHODS[known_as]  # every one is a dataclass
    has = {field.name for field in fields(chosen) if field.init}
    settings = settings | fixed
    return chosen(**{key: value for key, value in settings.items() if key in has})
