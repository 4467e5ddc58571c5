"""Errors a user can act on: one line that names the argument, what came, and the remedy."""

from __future__ import annotations

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
