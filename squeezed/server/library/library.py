"""The contexts as resources: listed, renamed, given a lifetime, removed."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from torch import Tensor

from squeezed.errors import shown
from squeezed.server.library.found import Entry, Shelf
from squeezed.server.library.names import NO_CONTEXT, checked_name
from squeezed.server.library.notes import PLACE, Note, Notes
from squeezed.server.library.passages import Passages
from squeezed.server.port import Engine
from squeezed.server.refusals import Refusal
from squeezed.system.files import flush

if TYPE_CHECKING:
    from squeezed.server.wire.requests import ContextChange

log = logging.getLogger("squeezed")

SCAN_SECONDS = 2.0
CUT_CONTEXTS = 16
"""Contexts whose passages are kept in memory."""


class Library:
    """All contexts of one directory."""

    def __init__(self, directory: Path, engine: Engine) -> None:
        (directory / PLACE).mkdir(parents=True, exist_ok=True)
        self.directory, self.engine = directory, engine
        self.shelf = Shelf([directory], 1, engine.measured, engine.check)
        self.notes = Notes(directory)
        self._cut: OrderedDict[str, Passages] = OrderedDict()
        self._one_change, self._one_cut = threading.RLock(), threading.Lock()
        engine.is_pinned = lambda name: self.notes.of(name, 0.0).pinned
        engine.cut = self.passages
        self._sweep()
        self.shelf.look()

    def watch(self) -> None:
        """Look for new contexts and expired ones every few seconds, in a thread, until `end`."""
        self.shelf.watch(SCAN_SECONDS)

    def end(self) -> None:
        self.shelf.end()

    def entries(self) -> list[Entry]:
        return sorted(self.shelf.contexts.values(), key=lambda entry: entry.name)

    def named(self, name: str) -> Entry:
        """Raises `Refusal` (404) that says what is there, or why it cannot be used."""
        entry = self.shelf.contexts.get(name)
        if entry is None:
            with self._one_change:
                self.shelf.look()
            entry = self.shelf.contexts.get(name)
        if entry is not None:
            return entry
        why = self.shelf.refused.get(name) or self.shelf.refused.get(f"{name}.sqz")
        if why is not None:
            raise Refusal(409, f"context: {shown(name)} cannot be used ({why})", "context")
        known = ", ".join(entry.name for entry in self.entries()[:10]) or "none"
        raise Refusal(
            404, f"context: there is none called {shown(repr(name))}; there are: {shown(known)}",
            "context", "context_not_found",
        )  # fmt: skip

    def longest(self, ids: Tensor) -> Entry | None:
        return self.shelf.longest(ids)

    def described(self, entry: Entry) -> dict[str, Any]:
        """A context as `/v1/contexts` shows it."""
        note = self.notes.of(entry.name, entry.made)
        return {
            "id": entry.name,
            "object": "context",
            "title": note.title,
            "source": note.source,
            "tokens": len(entry.tokens),
            "bytes": entry.bytes,
            "presets": list(entry.presets),
            "dense": entry.is_dense,
            "created": int(note.created or entry.made),
            "used": int(note.used) or None,
            "ttl": note.ttl,
            "expires": None if note.expires is None else int(note.expires),
            "pinned": note.pinned,
            "resident": entry.name in self.engine.resident(),
        }

    def refused(self) -> list[dict[str, str]]:
        """Directories that hold no usable context, and why."""
        return [{"id": shown(name), "why": why} for name, why in sorted(self.shelf.refused.items())]

    def passages(self, entry: Entry) -> Passages:
        """The text of a context in passages; takes a while the first time."""
        with self._one_cut:
            if entry.key not in self._cut:
                self._cut[entry.key] = Passages.of_entry(self.engine.tokenizer, entry)
                while len(self._cut) > CUT_CONTEXTS:
                    self._cut.popitem(last=False)
            self._cut.move_to_end(entry.key)
            return self._cut[entry.key]

    def check_free(self, name: str) -> str:
        """A name that a new context may get; raises `Refusal` (409) if it is taken."""
        name = checked_name(name)
        places = (self.directory / f"{name}.sqz", self.directory / name)
        if name in self.shelf.contexts or any(os.path.lexists(place) for place in places):
            raise Refusal(409, f"name: {name!r} is taken; delete it first, or choose another name",
                          "name", "name_taken")  # fmt: skip
        return name

    def path_of(self, name: str) -> Path:
        return self.directory / f"{name}.sqz"

    def made(self, name: str, note: Note) -> None:
        """Note a context that was just saved."""
        with self._one_change:
            self.notes.put(name, replace(note, created=time.time(), used=time.time()))
            self.shelf.look()

    def grown(self, name: str) -> None:
        """Find the new version of a context; who reads the old one goes on."""
        with self._one_change:
            self.engine.forget(name)
            self.shelf.look()

    def change(self, name: str, change: ContextChange) -> Entry:
        """Carry out what a `PATCH` names; the name last."""
        with self._one_change:
            entry = self.named(name)
            given = {field: getattr(change, field) for field in change.model_fields_set}
            new = given.pop("name", None)
            if given.get("pinned", False) is None:
                given.pop("pinned")
            note = replace(self.notes.of(name, entry.made), **given, used=time.time())
            self.notes.put(name, note)
            if new is not None and new.removesuffix(".sqz") != name:
                new = self.check_free(new)
                os.rename(entry.path, self.path_of(new))
                self.notes.rename(name, new)
                self.engine.forget(name)
                name = new
            self.shelf.look()
            return self.named(name)

    def remove(self, name: str) -> None:
        """Remove a context's directory in one step; who reads it goes on."""
        with self._one_change:
            entry = self.named(name)
            away = self.directory / PLACE / f"removed-{uuid4().hex}"
            os.rename(entry.path, away)
            flush(self.directory)
            self.notes.remove(name)
            self.engine.forget(name)
            self.shelf.look()
        shutil.rmtree(away, ignore_errors=True)

    def expire(self) -> list[str]:
        """Remove what has outlived its lifetime; names of what went."""
        now, gone = time.time(), []
        for entry in self.entries():
            expires = self.notes.of(entry.name, entry.made).expires
            if expires is not None and expires < now:
                self.remove(entry.name)
                gone.append(entry.name)
                log.info("contexts: %s has outlived its lifetime and was removed", entry.name)
        return gone

    def _sweep(self) -> None:
        """Finish what a killed server had begun to remove."""
        for away in (self.directory / PLACE).glob("removed-*"):
            shutil.rmtree(away, ignore_errors=True)


def names_none(context: str | None) -> bool:
    return context == NO_CONTEXT
