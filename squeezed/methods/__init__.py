"""Methods of sparse attention over a fixed context, behind one interface."""

from __future__ import annotations

from dataclasses import fields

from squeezed.errors import SqueezedError
from squeezed.methods.base import ContextAttention, Method
from squeezed.methods.squeezed import Squeezed

METHODS: dict[str, type[Method]] = {cls.name: cls for cls in (Squeezed,)}

__all__ = ["METHODS", "ContextAttention", "Method", "create"]


def create(name: str, **settings) -> Method:
    """Make a method by name with those of `settings` that it has.

    Raises:
        SqueezedError: no method of that name.
    """
    if name not in METHODS:
        raise SqueezedError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    chosen = METHODS[name]
    known = {field.name for field in fields(chosen)}
    return chosen(**{key: value for key, value in settings.items() if key in known})
