"""Names of the files in a saved context, and of those on their way there.

A new context has plain names. One that replaces an older one, in the older one's directory, has the
*token* of its saver in every name, so that both can lie there until the description is replaced.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable

from squeezed.system.files import kernel

MANIFEST = "context.json"
WORK = ".squeezed-"
"""Begins the name of a directory, or of a description, that belongs to a save under way."""
TOKEN = r"([0-9a-f]{24})"
TENSORS = re.compile(rf"(?:layer_[0-9]{{3,}}|observed_queries)(?:\.{TOKEN})?\.safetensors")
UNDER_WAY = re.compile(rf"{re.escape(WORK)}{TOKEN}")


def layer_file(index: int, token: str = "") -> str:
    """File of a layer."""
    return marked(f"layer_{index:03d}.safetensors", token)


def observed_file(token: str = "") -> str:
    """File of the observed queries, which only some methods read."""
    return marked("observed_queries.safetensors", token)


def observed_name(index: int) -> str:
    """Name in that file of the queries of a clustered layer."""
    return f"layer_{index:03d}"


def marked(name: str, token: str) -> str:
    """A plain name with a saver's token in it; as it is without one."""
    stem, ending = name.split(".")
    return f"{stem}.{token}.{ending}" if token else name


def new_token() -> str:
    """Names one save; its first eight digits say whose locks its maker sees."""
    return kernel() + secrets.token_hex(8)


def token_of(name: str) -> str | None:
    """The token in a name that a saver gives, "" in a plain one; `None` for any other name."""
    found = TENSORS.fullmatch(name) or UNDER_WAY.fullmatch(name)
    return (found[1] or "") if found else None


def common_token(names: Iterable[str]) -> str | None:
    """The token of all files of one context; `None` if they have several, or other names."""
    tokens = {token_of(name) for name in names}
    return tokens.pop() if len(tokens) == 1 else None
