"""JSON that strangers may have written -> Python values that are what their types say.

`parsed` takes text that other readers of JSON let pass: repeated keys, `NaN`, nesting without end.
`conformed` compares a value with a type hint: numbers, text, tuples, dictionaries, dataclasses, and
`Annotated[number, Range(...)]`. Both raise `Malformed` with one line.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from squeezed.errors import SqueezedError, shown

INT64 = 2**63


class Malformed(ValueError):
    """A value from a file is not what it should be. The message is one line."""


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included, or beyond `above`."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf

    def holds(self, lowest: float, highest: float) -> bool:
        return lowest >= self.low and lowest > self.above and highest <= self.high

    def __str__(self) -> str:
        low = self.low if self.above == -math.inf else f"above {self.above}"
        return f"finite numbers, {low} to {self.high}"


@dataclass(frozen=True)
class Sized:
    """A value whose JSON has at most so many bytes."""

    most_bytes: int


Positive = Annotated[float, Range(above=0)]
Count = Annotated[int, Range(low=0)]
PositiveCount = Annotated[int, Range(low=1)]


def parsed(text: bytes) -> Any:
    """The value of a JSON text in UTF-8."""
    try:
        return json.loads(
            text.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant
        )
    except RecursionError as error:
        raise Malformed("nested too deeply") from error
    except ValueError as error:
        raise Malformed(shown(error)) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Malformed("a key stands twice")
    return found


def _no_constant(name: str) -> Any:
    raise Malformed(f"{name} is not a number")


def conformed(value: Any, hint: Any, name: str) -> Any:
    """`value` as its type hint says, lists as tuples and records as dataclasses."""
    origin, given = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and is_dataclass(hint):
        return _record(value, hint, name)
    if origin is Annotated:
        return _annotated(value, given[0], given[1], name)
    if origin is Literal:
        return _expect(value in [x for x in given if type(x) is type(value)], value, given, name)
    if origin in (Union, types.UnionType):
        return _either(value, given, name)
    if origin is tuple:
        return _tuple(value, given[0], name)
    if origin is dict:
        _expect(isinstance(value, dict), value, "an object", name)
        return {_text(k, name): conformed(v, given[1], f"{name}.{k}") for k, v in value.items()}
    if hint in (int, float):
        _numbers([value], hint, Range(), name)
        return value
    if hint is str:
        return _text(value, name)
    return _expect(type(value) is hint, value, getattr(hint, "__name__", hint), name)


def _record(value: Any, kind: type, name: str) -> Any:
    _expect(isinstance(value, dict), value, "an object", name)
    hints = _hints(kind)
    wrong = sorted(set(value) ^ set(hints))
    if wrong:
        raise Malformed(f"{shown(name)}: {shown(wrong[0])} is missing or unknown")
    try:
        return kind(**{key: conformed(value[key], hints[key], f"{name}.{key}") for key in hints})
    except SqueezedError as error:
        raise Malformed(f"{shown(name)}: {shown(error)}") from error


@cache
def _hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


def _annotated(value: Any, hint: Any, limit: Range | Sized, name: str) -> Any:
    if isinstance(limit, Sized):
        size = len(json.dumps(value))
        _expect(size <= limit.most_bytes, f"{size} bytes", f"at most {limit.most_bytes}", name)
        return conformed(value, hint, name)
    _numbers([value], hint, limit, name)
    return value


def _either(value: Any, hints: tuple, name: str) -> Any:
    others = [hint for hint in hints if hint is not types.NoneType]
    if value is None and len(others) < len(hints):
        return None
    for hint in others[:-1]:
        try:
            return conformed(value, hint, name)
        except Malformed:
            continue
    return conformed(value, others[-1], name)


def _tuple(value: Any, hint: Any, name: str) -> tuple:
    _expect(isinstance(value, list), value, "a list", name)
    kind, limit = (*get_args(hint), None)[:2] if get_origin(hint) is Annotated else (hint, Range())
    if kind in (int, float) and isinstance(limit, Range):
        _numbers(value, kind, limit, name)
        return tuple(value)
    return tuple(conformed(item, hint, f"{name}[{i}]") for i, item in enumerate(value))


def _numbers(values: list, kind: type, limit: Range, name: str) -> None:
    """Finite numbers of a kind, of which a list may have millions."""
    if not values:
        return
    allowed = {int} if kind is int else {int, float}
    _expect(set(map(type, values)) <= allowed, values, f"{kind.__name__} numbers", name)
    low, high = min(values), max(values)
    most = INT64 - 1 if kind is int else 1e308
    _expect(-most <= low and high <= most and limit.holds(low, high), values, limit, name)


def _text(value: Any, name: str) -> str:
    """Text that can be encoded: JSON may hold half of a character."""
    _expect(isinstance(value, str), value, "text", name)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Malformed(f"{shown(name)}: half a character in a text") from None
    return value


def _expect(good: bool, value: Any, wanted: Any, name: str) -> Any:
    if not good:
        found = value[0] if isinstance(value, list) and len(value) == 1 else value
        raise Malformed(f"{shown(name)}: expected {shown(wanted)}, got {_kind_of(found)}")
    return value


def _kind_of(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    return shown(repr(value)) if type(value) is not int or abs(value) < INT64 else "a huge number"


def grid(value: Any, shape: Iterable[int], limit: Range, dtype: torch.dtype, name: str) -> Tensor:
    """Nested lists of numbers as a tensor of a known shape; `None` is minus infinity."""
    shape = tuple(shape)
    flat: list[Any] = [value]
    sizes: list[int] = []
    for size in shape:
        if not all(isinstance(part, list) and len(part) == size for part in flat):
            raise Malformed(f"{shown(name)}: expected nested lists of shape {shape}")
        flat, sizes = [item for part in flat for item in part], [*sizes, size]
    known = [item for item in flat if item is not None]
    if len(known) < len(flat) and limit.low > -math.inf:
        raise Malformed(f"{shown(name)}: null, expected {limit}")
    _numbers(known, float, limit, name)
    filled = [-math.inf if item is None else item for item in flat]
    return torch.tensor(filled, dtype=dtype).reshape(shape)
