"""The contexts in some directories, found at start and while running.

Only descriptions are read here (`context.json`), never a layer. A context that cannot be used is
kept with its reason, and looked at again when it changes.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from squeezed.context.record import ContextRecord
from squeezed.context.storage import directory
from squeezed.context.storage.manifest import MANIFEST
from squeezed.errors import ContextFileError, SqueezedError, shown
from squeezed.system.failures import cause_of, explained
from squeezed.vllm.cutting import whole_blocks

log = logging.getLogger("squeezed")

Check = Callable[[ContextRecord], None]
"""Raises `SqueezedError` for a context that the engine cannot use."""


@dataclass(frozen=True)
class Found:
    """A saved context that the engine can use.

    Attributes:
        name: that of its directory, without `.sqz`.
        version: of its description; a context that is replaced gets another.
        tokens: ids of the document, whole blocks.
        dropped: last tokens of the document that every request reads itself.
        bytes: taken on every rank.
        presets: names.
        sliding: whether some layers only see a window.
    """

    name: str
    path: Path
    version: str
    tokens: list[int]
    dropped: int
    bytes: int
    presets: tuple[str, ...]
    sliding: bool = False

    @property
    def key(self) -> str:
        return f"{self.name}@{self.version}"

    def begins(self, prompt: Sequence[int]) -> bool:
        """Whether the prompt is this document and more."""
        count = len(self.tokens)
        if len(prompt) <= count or prompt[count - 1] != self.tokens[-1]:
            return False
        return list(prompt[:count]) == self.tokens


class Catalogue:
    """What lies in the directories, as the last look found it.

    Args:
        places: directories of saved contexts, or saved contexts themselves.
        block_size: tokens of a block.
        measured: bytes of a context on a rank.
        check: what the engine cannot use.
    """

    def __init__(
        self,
        places: Iterable[Path],
        block_size: int,
        measured: Callable[[ContextRecord], int],
        check: Check = lambda record: None,
    ) -> None:
        self.places, self.block_size = tuple(places), block_size
        self.measured, self.check = measured, check
        self.contexts: dict[str, Found] = {}
        self.refused: dict[str, str] = {}
        self._seen: dict[Path, tuple[tuple, Found | str]] = {}
        self._ended = threading.Event()
        self._one_looks = threading.Lock()

    def look(self) -> None:
        """Read what is new or changed, and forget what is gone."""
        with self._one_looks:
            self._look()

    def _look(self) -> None:
        seen: dict[Path, tuple[tuple, Found | str]] = {}
        for path in self._candidates():
            known = self._seen.get(path)
            state = _state(path, whole=not known or isinstance(known[1], str))
            if state is None:
                continue
            if known is None or state not in (known[0], known[0][:1]):
                known = state, self._read(path)
            seen[path] = known
        found = [entry for _, entry in seen.values() if not isinstance(entry, str)]
        refused = {p.stem: e for p, (_, e) in seen.items() if isinstance(e, str)}
        self._seen = seen
        # whole dictionaries take the older ones' places: readers in other threads see one or the
        # other
        self.contexts, self.refused = {entry.name: entry for entry in found}, refused

    def watch(self, seconds: float) -> None:
        """Look again every `seconds`, in a thread, until `end`."""
        threading.Thread(target=self._watch, args=(seconds,), daemon=True).start()

    def end(self) -> None:
        self._ended.set()

    def match(self, prompt: Sequence[int]) -> Found | None:
        """The longest context that begins `prompt`, which must say more."""
        fitting = [entry for entry in self.contexts.values() if entry.begins(prompt)]
        return max(fitting, key=lambda entry: len(entry.tokens), default=None)

    def named(self, name: str) -> Found:
        """The context of that name; raises `SqueezedError` that says what is there, or why not.

        One that lies there since the last look is looked for at once: who asks for it by name has
        just made it.
        """
        if name not in self.contexts and any(path.stem == name for path in self._candidates()):
            self.look()
        found = self.contexts.get(name)
        if found is not None:
            return found
        why = self.refused.get(name)
        if why is not None:
            raise SqueezedError(f"squeezed_context: {shown(name)} cannot be used ({why})")
        known = ", ".join(sorted(self.contexts)) or "none"
        raise SqueezedError(
            f"squeezed_context: expected a context that is registered ({shown(known)}) or 'none', "
            f"got {shown(repr(name))}"
        )

    def _watch(self, seconds: float) -> None:
        while not self._ended.wait(seconds):
            try:
                self.look()
            except Exception:
                log.exception("contexts: looking for contexts failed; trying again")

    def _candidates(self) -> list[Path]:
        found = []
        for place in self.places:
            if (place / MANIFEST).is_file():
                found.append(place)
                continue
            try:
                inside = sorted(place.iterdir())
            except OSError as error:
                log.warning("contexts: %s cannot be read (%s)", shown(place), error.strerror)
                continue
            found += [p for p in inside if p.name[:1] != "." and p.is_dir()]
        return found

    def _read(self, path: Path) -> Found | str:
        try:
            entry = self._opened(path)
        except Exception as error:  # whatever a directory holds, the server goes on
            why = str(explained(error) or f"{type(error).__name__}: {cause_of(error)}")
            log.warning("contexts: %s is not used: %s", shown(path), why)
            return why
        log.info("contexts: %s has %d tokens", entry.name, len(entry.tokens))
        return entry

    def _opened(self, path: Path) -> Found:
        version = version_of(path)
        record = directory.load(path)
        tokens = record.tokens.tolist()
        count = whole_blocks(len(tokens), self.block_size)
        dropped = len(tokens) - count
        pinned = record.config.clustering.pinned_last
        if not count:
            raise SqueezedError(f"{len(tokens)} tokens are less than a block of {self.block_size}")
        if dropped > pinned:
            raise SqueezedError(
                f"its last {dropped} tokens do not fill a block of {self.block_size}, and only "
                f"{pinned} of them are pinned; use smaller blocks (--block-size 16)"
            )
        record.check_plain("vLLM's backend")
        self.check(record)
        if version_of(path) != version:
            raise ContextFileError("it was replaced while it was read")
        return Found(
            name=path.stem,
            path=path,
            version=version,
            tokens=tokens[:count],
            dropped=dropped,
            bytes=self.measured(record),
            presets=tuple(record.calibrations),
            sliding=any(window is not None for window in record.windows),
        )


def version_of(path: Path) -> str:
    """What tells the context that lies at `path` now from one that lay there before."""
    try:
        with open(path / MANIFEST, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    except OSError as error:
        raise ContextFileError(f"{shown(path)}: {error.strerror or error}") from error


def _state(path: Path, whole: bool) -> tuple | None:
    """Changes whenever another context takes a place; `None` where there is no directory.

    Args:
        whole: look at every file: what is missing in a context that was refused may still come.
    """
    try:
        names = sorted(path.iterdir()) if whole else ()
        first = path / MANIFEST
        return tuple(_stamp(file) for file in (first if first.exists() else path, *names))
    except OSError:
        return None


def _stamp(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_ctime_ns, found.st_size
