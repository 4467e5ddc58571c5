"""Names of contexts: none of them can leave the directory."""

from __future__ import annotations

import re

from squeezed.errors import SqueezedError, shown

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
"""What a new context may be called."""

NO_CONTEXT = "none"
"""Names no context: a request that says so runs dense."""


def checked_name(name: str) -> str:
    """Return a name that a context may get, or raise `SqueezedError`."""
    if not re.fullmatch(NAME.strip("^$"), name) or name.lower() == NO_CONTEXT:
        raise SqueezedError(
            "name: expected up to 100 letters, digits, dots, dashes and underscores that begin "
            f"with a letter or digit, and not {NO_CONTEXT!r}; got {shown(repr(name))}"
        )
    return name.removesuffix(".sqz")


def name_from_file(file: str) -> str:
    """A name for what was uploaded as `file`."""
    stem = file.replace("\\", "/").rpartition("/")[2].rpartition(".")[0] or file
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:80]
    return plain or "document"
