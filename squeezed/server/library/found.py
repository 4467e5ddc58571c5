"""The contexts of a directory that the engine can use, and the reasons why others cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from torch import Tensor

from squeezed.context.prompt import PromptTemplate
from squeezed.context.storage import directory
from squeezed.context.storage.manifest import MANIFEST
from squeezed.errors import ContextFileError
from squeezed.vllm.catalogue import Catalogue, version_of


@dataclass(frozen=True)
class Entry:
    """A saved context.

    Attributes:
        name: that of its directory, without `.sqz`.
        version: of its description; a context that is replaced gets another.
        tokens: `[P]` int64, ids of the document with the template before it.
        bytes: taken in the engine's memory.
        is_dense: too short to cluster: all of it is always read.
        made: seconds since 1970.
    """

    name: str
    path: Path
    version: str
    tokens: Tensor
    template: PromptTemplate
    bytes: int
    presets: tuple[str, ...]
    is_dense: bool
    made: float

    @property
    def key(self) -> str:
        return f"{self.name}@{self.version}"

    def begins(self, ids: Tensor) -> bool:
        """Whether a prompt `[S]` is this document and more."""
        count = len(self.tokens)
        return len(ids) > count and ids[:count].equal(self.tokens)


class Shelf(Catalogue):
    """Every context of one directory, whole; vLLM's catalogue cuts them to blocks."""

    contexts: dict[str, Entry]  # type: ignore[assignment]

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._one_look = Lock()

    def look(self) -> None:
        """One look at a time: an older one must not overwrite what a newer one found."""
        with self._one_look:
            super().look()

    def longest(self, ids: Tensor) -> Entry | None:
        """The longest context that begins a prompt `[S]`, which must say more."""
        fitting = [entry for entry in self.contexts.values() if entry.begins(ids)]
        return max(fitting, key=lambda entry: len(entry.tokens), default=None)

    def match(self, prompt: Sequence[int]) -> None:
        raise NotImplementedError("a shelf's contexts are whole: ask longest()")

    def _opened(self, path: Path) -> Entry:  # type: ignore[override]
        version = version_of(path)
        record = directory.load(path)
        self.check(record)
        entry = Entry(
            name=path.name.removesuffix(".sqz"),
            path=path,
            version=version,
            tokens=record.tokens,
            template=record.template,
            bytes=self.measured(record),
            presets=tuple(record.calibrations),
            is_dense=record.is_dense,
            made=(path / MANIFEST).stat().st_mtime,
        )
        if version_of(path) != version:
            raise ContextFileError("it was replaced while it was read")
        return entry
