"""What the server knows of a context besides its files: title, source, lifetime, pinning.

A context's own directory is never touched: the notes lie in `.server/` beside it.
"""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from threading import RLock
from typing import Any
from uuid import uuid4

from squeezed.system.files import flush, flush_open

log = logging.getLogger("squeezed")

PLACE = ".server"
"""Directory of the server's own files; contexts are never looked for in it."""

USE_SECONDS = 30
"""A use is written down if the one that is, is older."""


@dataclass(frozen=True)
class Note:
    """What is known of one context.

    Attributes:
        title: for people.
        source: name of the file it was made from.
        ttl: seconds after its last use at which it is removed; `None` for never.
        pinned: it stays in memory once it is there, and has no lifetime.
        created, used: seconds since 1970.
    """

    title: str | None = None
    source: str | None = None
    ttl: float | None = None
    pinned: bool = False
    created: float = 0.0
    used: float = 0.0

    @property
    def expires(self) -> float | None:
        return None if self.ttl is None or self.pinned else self.used + self.ttl

    @classmethod
    def of(cls, stored: Any) -> Note:
        """From JSON; what is of another kind is left out."""
        kinds: dict[str, Any] = {
            "title": str,
            "source": str,
            "ttl": (int, float),
            "pinned": bool,
            "created": (int, float),
            "used": (int, float),
        }
        given = stored if isinstance(stored, dict) else {}
        known = [each.name for each in fields(cls)]
        return cls(**{n: given[n] for n in known if isinstance(given.get(n), kinds[n])})


class Notes:
    """The notes of all contexts of a directory, by name; every change is on the disk."""

    def __init__(self, directory: Path) -> None:
        self.place = directory / PLACE / "contexts"
        self._notes: dict[str, Note] = {}
        self._written: dict[str, float] = {}
        self._one = RLock()

    def of(self, name: str, made: float) -> Note:
        """The note of a context, or a new one for what somebody else `made`."""
        with self._one:
            if name not in self._notes:
                self._notes[name] = self._read(name) or Note(created=made, used=time.time())
            return self._notes[name]

    def put(self, name: str, note: Note) -> None:
        with self._one:
            self._notes[name] = note
            self._written[name] = note.used
            write_json(self._file(name), asdict(note))

    def used(self, name: str) -> None:
        """Note that a context was used now."""
        with self._one:
            now = time.time()
            note = self._notes[name] = replace(self.of(name, now), used=now)
            if note.ttl is not None and now - self._written.get(name, 0) > USE_SECONDS:
                with suppress(OSError):  # a full disk must not end an answer
                    self.put(name, note)

    def rename(self, old: str, new: str) -> None:
        with self._one:
            note = self.of(old, time.time())
            self.put(new, note)
            self.remove(old)

    def remove(self, name: str) -> None:
        with self._one:
            self._notes.pop(name, None)
            self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.place / f"{name}.json"

    def _read(self, name: str) -> Note | None:
        try:
            return Note.of(json.loads(self._file(name).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            log.warning("contexts: the note of %s cannot be read; it gets a new one", name)
            return None


def write_json(path: Path, content: Any) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid4().hex}.draft")
    try:
        with open(draft, "w", encoding="utf-8") as stream:
            json.dump(content, stream)
            stream.flush()
            flush_open(stream.fileno())
        os.replace(draft, path)
        flush(path.parent)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
