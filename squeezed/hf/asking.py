"""How a question is answered: by which method, with which budget, on which implementation."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from squeezed.attention import check_name
from squeezed.attention.proof import prove
from squeezed.config import BEST, DEFAULT_BUDGET, check_budget
from squeezed.context.record import ContextRecord
from squeezed.errors import SqueezedError, expect
from squeezed.methods import Method, create
from squeezed.methods.base import ContextAttention


@dataclass(frozen=True)
class Asking:
    """Settings of a question.

    Attributes:
        budget: share of the clustered keys read exactly, on average, in (0, 1]; 1.0 is dense.
        preset: `best` or `paper`; other methods ignore it.
        implementation: `auto`, `reference`, `cpu` or `triton`; other methods ignore it.
        method: `squeezed`, or another name of `squeezed.methods.METHODS`.

    Raises:
        SqueezedError: a budget outside its range, or no method or implementation of that name.
    """

    budget: float = DEFAULT_BUDGET
    preset: str = BEST.name
    implementation: str = "auto"
    method: str = "squeezed"

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", check_budget(self.budget))
        for name in ("preset", "implementation"):
            expect(name, getattr(self, name), str, "a name (str)")
        check_name(self.implementation)
        self.made()

    @classmethod
    def among(cls, arguments: dict[str, Any]) -> tuple[Asking, dict[str, Any]]:
        """The settings that a call's keyword arguments name, and the arguments that are left."""
        own = {field.name for field in fields(cls)} & arguments.keys()
        others = {name: value for name, value in arguments.items() if name not in own}
        return cls(**{name: arguments[name] for name in own}), others

    def made(self) -> Method:
        """The method with these settings."""
        return create(self.method, preset=self.preset, implementation=self.implementation)

    def attentions(self, record: ContextRecord) -> Sequence[ContextAttention]:
        """The method's view of every full-attention layer of a context."""
        return self.made().prepare(record, self.budget)

    def prove(self, presets: Collection[str], device: torch.device, dtype: torch.dtype) -> None:
        """Raise `SqueezedError` if a context would not be answered so, before there is one.

        Args:
            presets: names of those that the context will be calibrated for.
            device, dtype: of the context's keys.
        """
        self.check_preset(presets)
        method = self.made()
        if hasattr(method, "implementation"):
            prove(method.implementation, device, dtype)

    def check_preset(self, presets: Collection[str]) -> None:
        """Raise `SqueezedError` if the method needs a preset that is not one of `presets`."""
        preset = getattr(self.made(), "preset", None)
        if preset is not None and preset not in presets:
            raise SqueezedError(f"preset: expected one of {', '.join(presets)}, got {preset!r}")
