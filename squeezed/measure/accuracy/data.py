"""Reading data files; a missing file or a wrong schema is named with its file, line and field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from squeezed.errors import SqueezedError


def required(path: Path | None, what: str, suite: str) -> Path:
    """`path` if it exists."""
    if path is None:
        raise SqueezedError(f"data: the suite {suite} needs {what}, got no path; give --data PATH")
    if not path.exists():
        raise SqueezedError(f"data: expected {what} at {path}, found nothing; check --data")
    return path


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SqueezedError(
            f"data: could not read {path}: {error.strerror}; check --data"
        ) from None
    except ValueError as error:
        raise SqueezedError(f"{path}: expected JSON, got {error}; fetch the file again") from None


def read_json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """Line number from 1 and object of every line."""
    with open(path, encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except ValueError:
                raise SqueezedError(
                    f"{path}: line {number}: expected a JSON object, got {line[:40]!r}; fetch the "
                    "file again"
                ) from None


def field(record: Any, name: str, kind: type, where: str) -> Any:
    """`record[name]`, which must be a `kind`; `where` names file and line for the message."""
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind):
        got = "nothing" if value is None else type(value).__name__
        raise SqueezedError(
            f"{where}: field {name!r}: expected {kind.__name__}, got {got}; is it the right file?"
        )
    return value


def read_text(path: Path) -> str:
    """Plain text, or the field `text` of a JSON object."""
    if path.suffix == ".json":
        return field(read_json(path), "text", str, str(path))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SqueezedError(f"data: could not read {path} as UTF-8 text: {error}") from None
