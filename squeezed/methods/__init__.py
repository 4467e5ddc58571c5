"""Methods of sparse attention over a fixed context, behind one interface."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from squeezed.config import PRESETS
from squeezed.context.encoding import ENCODINGS
from squeezed.errors import SqueezedError, expect
from squeezed.methods.base import ContextAttention, Method
from squeezed.methods.dense import Dense
from squeezed.methods.lazyllm import LazyLLM
from squeezed.methods.multipole import Multipole
from squeezed.methods.oracle import Oracle
from squeezed.methods.quantised import OURS, Quantised
from squeezed.methods.quest import Quest
from squeezed.methods.random import Random
from squeezed.methods.retrieval import Retrieval
from squeezed.methods.routing import Routing
from squeezed.methods.schemes import SCHEMES
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


def few_bits() -> dict[str, tuple[str, dict]]:
    """`kivi4`, `rotation3`, `rows2`, ...: dense attention to keys and values of so many bits; with
    `best-` before it, selection among them; with `-raw` behind it, keys as the model makes them."""
    found: dict[str, tuple[str, dict]] = {}
    for scheme in (*SCHEMES, *OURS, *ENCODINGS):
        named = scheme == "fp8" or scheme in ENCODINGS
        for bits in (8,) if named else (2, 3, 4, 8):
            name = scheme if named else f"{scheme}{bits}"
            settings = {"scheme": scheme, "bits": bits}
            found[name] = Quantised.name, settings
            found[f"best-{name}"] = Quantised.name, settings | {"selects": True}
            if scheme in SCHEMES:
                found[f"{name}-raw"] = Quantised.name, settings | {"centred": False}
    return found


ALIASES: dict[str, tuple[str, dict]] = {
    preset: (Squeezed.name, {"preset": preset}) for preset in PRESETS
}
"""Names that stand for a method with settings: every preset of squeezed attention."""

FEW_BITS = few_bits()
"""The same for ways to write keys and values in few bits."""

__all__ = ["ALIASES", "FEW_BITS", "METHODS", "ContextAttention", "Method", "create"]


def create(name: str, **settings: Any) -> Method:
    """Make a method by its name or alias with those of `settings` that it has.

    Raises:
        SqueezedError: no method of that name.
    """
    expect("method", name, str, "a method's name (str)")
    known_as, fixed = (ALIASES | FEW_BITS).get(name, (name, {}))
    kinds = METHODS | {Quantised.name: Quantised}
    if known_as not in kinds:
        known = ", ".join([*METHODS, *ALIASES, *FEW_BITS])
        raise SqueezedError(f"method: expected one of {known}, got {name!r}; see squeezed.methods")
    chosen: Any = kinds[known_as]  # every one is a dataclass
    has = {field.name for field in fields(chosen) if field.init}
    settings = settings | fixed
    return chosen(**{key: value for key, value in settings.items() if key in has})
