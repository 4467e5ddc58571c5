"""A result file: JSON lines, one per answer, that survives being cut off."""

from __future__ import annotations

import json
import os
from pathlib import Path

from squeezed.errors import SqueezedError
from squeezed.system.failures import cause_of

KEY = ("task", "document", "question", "method", "budget")
FIXED = ("suite", "model", "context_tokens", "seed")
"""Header fields that must not change when a run goes on."""


class ResultFile:
    """Appends rows to `path` and knows which answers are there already.

    The first line is a header with what the run is; rows are of the kinds `answer`, `layers` (error
    histograms) and `skipped`. A last line without its end is removed when the file is opened.

    Raises:
        SqueezedError: the file belongs to another run, a line before the last is damaged, or
            nothing can be written there.
    """

    def __init__(self, path: Path, header: dict) -> None:
        self.path, self.rows = path, 0
        check_writable(path)
        rows = read_rows(path, repair=True) if path.exists() else []
        self.done = {key_of(row) for row in rows if row["kind"] == "answer"}
        self.skipped = {(row["task"], row["document"]) for row in rows if row["kind"] == "skipped"}
        if rows:
            self._check(rows[0], header)
        else:
            self.append({"kind": "header", **header})
        self.rows = max(0, len(rows) - 1)

    def _check(self, old: dict, new: dict) -> None:
        for name in FIXED:
            if old.get(name) != new.get(name):
                raise SqueezedError(
                    f"output: {self.path} holds a run with {name} {old.get(name)!r}, this one has "
                    f"{new.get(name)!r}; choose another file"
                )

    def append(self, row: dict) -> None:
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.rows += 1
        if row["kind"] == "answer":
            self.done.add(key_of(row))

    def leave_no_header_alone(self) -> None:
        """Remove the file if it has no row: it would refuse the next run of another suite."""
        if not self.rows and self.path.is_file():
            self.path.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise `SqueezedError` unless rows can be appended to `path`; leaves no new file there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with open(path, "a", encoding="utf-8"):
            pass
        if new:
            path.unlink()
    except (OSError, ValueError) as error:
        raise SqueezedError(
            f"output: cannot write {path} ({cause_of(error)}); choose another file"
        ) from error


def key_of(row: dict) -> tuple:
    return tuple(row[name] for name in KEY)


def read_rows(path: Path, repair: bool = False) -> list[dict]:
    """All complete rows; `repair` cuts a half-written last line off the file."""
    if not path.is_file():
        raise SqueezedError(
            f"results: expected a result file at {path}, found none; run eval first"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SqueezedError(
            f"results: cannot read {path} ({cause_of(error)}); check its permissions"
        ) from error
    complete = content.rfind(b"\n") + 1
    if repair and complete < len(content):
        os.truncate(path, complete)
    rows = []
    for number, line in enumerate(content[:complete].splitlines(), 1):
        try:
            row = json.loads(line)
            row["kind"]
        except (ValueError, KeyError, TypeError):
            raise SqueezedError(
                f"{path}: line {number}: expected a result row, got {line[:40]!r}; remove the line"
            ) from None
        rows.append(row)
    return rows
