"""Errors a user can act on: one line that names the argument, what came, and the remedy."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

SHOWN_LETTERS = 160


class SqueezedError(ValueError):
    """Bad input. The message is one line; the command line prints it and exits with status 2."""


class UnsupportedModelError(SqueezedError):
    """The model computes attention in a way that this package does not reproduce."""


class ContextFileError(SqueezedError):
    """A saved context is missing, altered, truncated, or was made by other means."""


def shown(value: object) -> str:
    """Any value, such as a path or a number from a file, as part of one readable line."""
    text = str(value)
    if len(text) > SHOWN_LETTERS:
        text = f"{text[: SHOWN_LETTERS // 2]}…{text[-SHOWN_LETTERS // 2 :]}"
    plain = (c if c.isprintable() else c.encode("unicode_escape") for c in text)
    return "".join(c if isinstance(c, str) else c.decode() for c in plain)


def expect(name: str, value: Any, kinds: type | tuple[type, ...], wanted: str) -> Any:
    """Return `value` if it is one of `kinds`, else raise `SqueezedError` that says what is wanted.

    `True` and `False` are no numbers here.
    """
    allowed = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise SqueezedError(f"{name}: expected {wanted}, got {got(value)}")
    return value


def whole(name: str, value: Any, least: int) -> int:
    """Return `value` if it is a whole number of at least `least`, else raise `SqueezedError`."""
    if expect(name, value, Integral, f"a whole number of at least {least}") < least:
        raise SqueezedError(f"{name}: expected at least {least}, got {value}")
    return value


def within(name: str, value: Any, low: float, high: float) -> Any:
    """Return `value` if it is a number from `low` to `high`, else raise `SqueezedError`."""
    wanted = f"a number from {low:g} to {high:g}"
    if not low <= expect(name, value, Real, wanted) <= high:
        raise SqueezedError(f"{name}: expected {wanted}, got {value}")
    return value


def shares(name: str, values: Any) -> tuple[float, ...]:
    """Return a list or tuple of numbers as a tuple, else raise `SqueezedError`."""
    wanted = "a tuple of shares such as (0.01, 0.05)"
    expect(name, values, (tuple, list), wanted)
    return tuple(expect(name, share, Real, wanted) for share in values)


def got(value: Any) -> str:
    """A value of the wrong type, and that type."""
    return str(value) if value is None else f"{shown(repr(value))} ({type(value).__name__})"
