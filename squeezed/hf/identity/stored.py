"""What a fingerprint must be that came from a file, before it is compared with a model.

Whoever writes a context may write any fingerprint. So every entry must have the shape that
`entries` gives it, and only as many tokens as `behaviour` takes go through the model.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from squeezed.errors import ContextFileError, shown
from squeezed.hf.identity.behaviour import PROJECTIONS as PROJECTED
from squeezed.hf.identity.behaviour import TOKENS
from squeezed.hf.identity.sketch import BUCKETS, PROJECTIONS, ROUNDINGS, type_name
from squeezed.hf.identity.weights import INTEGERS, KINDS

NUMBER_BYTES = 4
"""Of a float32, as which all numbers of a fingerprint are kept."""
SKETCHED = tuple(PROJECTIONS * buckets + 1 for buckets in (BUCKETS, 1))
"""Numbers that a sketch may have: its buckets, and its norm."""
ROUNDED = tuple(PROJECTIONS * types for types in range(3))
MOST_ROWS, MOST_IDS = 1 << 40, 1 << 31
TYPES = frozenset(map(type_name, (*ROUNDINGS, *INTEGERS)))


def check_stored(fingerprint: object) -> dict[str, Any]:
    """Return `fingerprint` if `model_fingerprint` may have made it.

    Raises:
        ContextFileError: it is no record, or one of its fields is not what it must be.
    """
    made = _record(fingerprint, "model")
    for name in ("weights", "numbers", "partial", "packed", "behaviour"):
        _require(name in made, f"model.{name} is missing")
    for name, entry in _record(made["weights"], "model.weights").items():
        _require(_is_entry(entry), f"model.weights: {shown(name)} is no sketch")
    digests = _record(made["numbers"], "model.numbers").values()
    _require(all(isinstance(x, str) for x in digests), "model.numbers: expected texts")
    for name in ("partial", "packed"):
        _require(isinstance(made[name], bool), f"model.{name}: expected true or false")
    behaviour = made["behaviour"]
    _require(behaviour is None or _is_behaviour(behaviour), "model.behaviour: no such record")
    return made


def _record(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _malformed(f"{name}: expected a record, got {type(value).__name__}")
    return value


def _is_entry(entry: object) -> bool:
    """`[kind, dtype, rows, own, rounded]`, as `entries.entry_of` makes it."""
    if not isinstance(entry, (list, tuple)) or len(entry) != 5:
        return False
    kind, dtype, rows, own, rounded = entry
    return (
        _is_one_of(kind, KINDS)
        and _is_one_of(dtype, TYPES)
        and type(rows) is int
        and 0 <= rows < MOST_ROWS
        and _numbers_in(own) in SKETCHED
        and _numbers_in(rounded) in ROUNDED
    )


def _is_one_of(value: object, names: frozenset[str]) -> bool:
    return isinstance(value, str) and value in names


def _is_behaviour(record: object) -> bool:
    if not isinstance(record, Mapping) or not {"ids", "dtype", "projected"} <= record.keys():
        return False
    ids, projected = record["ids"], _numbers_in(record["projected"])
    return (
        isinstance(ids, (list, tuple))
        and len(ids) == TOKENS
        and all(type(x) is int and 0 <= x < MOST_IDS for x in ids)
        and isinstance(record["dtype"], str)
        and projected > 0
        and not projected % (2 * TOKENS * PROJECTED)
    )


def _numbers_in(text: object) -> int:
    """How many numbers a text holds; -1 if it is none."""
    try:
        held = len(base64.b64decode(text, validate=True)) if isinstance(text, str) else -1
    except (binascii.Error, ValueError):
        return -1
    return held // NUMBER_BYTES if held % NUMBER_BYTES == 0 else -1


def _require(good: bool, complaint: str) -> None:
    if not good:
        raise _malformed(complaint)


def _malformed(complaint: str) -> ContextFileError:
    return ContextFileError(
        f"{complaint}; no context says that of its model: do not trust it, index the document again"
    )
