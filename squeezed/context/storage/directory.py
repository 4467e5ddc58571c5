"""Opening a saved context: layers are read when first used, once, into private memory, and checked
there (`held`, `structure`).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from squeezed.context.record import ContextRecord, Layer
from squeezed.context.storage import tensorfile
from squeezed.context.storage.description import described
from squeezed.context.storage.held import HeldDirectory
from squeezed.context.storage.manifest import crafted, read_manifest, stored_text
from squeezed.context.storage.names import (
    MANIFEST,
    common_token,
    layer_file,
    observed_file,
    observed_name,
)
from squeezed.context.storage.outline import DTYPES, OBSERVED_QUERIES, Outline
from squeezed.context.storage.strict import Malformed
from squeezed.context.storage.structure import check_layer, check_tensor, layer_of
from squeezed.errors import ContextFileError, shown
from squeezed.system.forks import Turns

ATTEMPTS = 1000
"""How often a reader begins again because savers replaced what it was opening."""


def load(path: Path, device: torch.device | str = "cpu") -> ContextRecord:
    """Open a saved context; layers are read when first used.

    What is read later is what lay there now, even if another context takes its place meanwhile.

    Raises:
        ContextFileError: nothing there, another format version, or a file that was altered or cut.
    """
    for _ in range(ATTEMPTS):
        directory = _opened(path)
        try:
            return _loaded(directory, path, torch.device(device))
        except (OSError, ContextFileError) as error:
            if directory.is_current():
                raise _unreadable(path, error) from error
    raise ContextFileError(f"{shown(path)}: replaced again and again; try later")


def _opened(path: Path) -> HeldDirectory:
    try:
        return HeldDirectory(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _nothing_there(path) from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _loaded(directory: HeldDirectory, path: Path, device: torch.device) -> ContextRecord:
    file = path / MANIFEST
    if directory.size(MANIFEST) < 0:
        what = "is no file" if MANIFEST in directory.names() else "is missing"
        raise _nothing_there(path, what)
    manifest = read_manifest(stored_text(directory), file)
    try:
        fields = described(manifest, device)
    except Malformed as error:
        raise crafted(file, error) from error
    directory.hold(manifest["files"])
    for name, record in manifest["files"].items():
        _check_size(path / name, directory.size(name), record.bytes)
    source = _Source(directory, path, manifest["files"], device, len(manifest["tokens"]))
    return ContextRecord(
        layers=StoredLayers(source, manifest["layers"], manifest["scales"]),
        observed=ObservedQueries(source, [x for x in manifest["layers"] if x.is_clustered]),
        **fields,
    )


def _check_size(file: Path, found: int, expected: int) -> None:
    if found != expected:
        what = "no file" if found < 0 else f"{found} bytes"
        raise ContextFileError(
            f"{shown(file)}: expected {expected} bytes, found {what}; the context is damaged, index"
            " the document again"
        )


def _nothing_there(path: Path, what: str = "is missing") -> ContextFileError:
    return ContextFileError(
        f"{shown(path)}: no saved context there ({MANIFEST} {what}); make one with squeezed index"
    )


def _unreadable(path: Path, error: Exception) -> ContextFileError:
    if isinstance(error, ContextFileError):
        return error
    reason = error.strerror or error if isinstance(error, OSError) else error
    return ContextFileError(
        f"{shown(path)}: could not be read: {shown(reason)}; check its name and your rights to it"
    )


READERS = 4
"""Most layers that are read at once by who takes all of them; each keeps two cores busy, for its
checksum is counted while it is read."""


class _Source:
    """Where the tensors of one saved context come from: read once, checked, on its device."""

    def __init__(
        self, directory: HeldDirectory, path: Path, files: dict, device: torch.device, tokens: int
    ) -> None:
        self.directory, self.path, self.files = directory, path, files
        self.device, self.tokens = device, tokens
        self.token = common_token(files) or ""

    def read(self, name: str, check: Callable[[dict[str, Tensor]], None]) -> dict[str, Tensor]:
        """The tensors of a file, which `check` may find `Malformed`.

        They are checked while the checksum of the same bytes is still counted.
        """
        file, record = self.path / name, self.files[name]
        try:
            content, sha256 = self.directory.read(name, record.bytes)
            _check_size(file, len(content), record.bytes)
            try:
                tensors = tensorfile.tensors_in(content)
                check(tensors)
            finally:  # an altered file is called that, whatever else is wrong with it
                self._check_sum(file, sha256(), record.sha256)
        except Malformed as error:
            raise crafted(file, error) from error
        except (OSError, RuntimeError, MemoryError) as error:
            raise _unreadable(file, error) from error
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def _check_sum(self, file: Path, found: str, expected: str) -> None:
        if found != expected:
            raise ContextFileError(
                f"{shown(file)}: its checksum is not the one in {MANIFEST}; the file was altered, "
                "index the document again"
            )


class StoredLayers(Sequence[Layer]):
    """The layers of a saved context, each read and checked when first asked for."""

    def __init__(
        self, source: _Source, outlines: tuple[Outline, ...], scales: tuple[float, ...]
    ) -> None:
        """`scales` has the softmax scale of every layer that is no window."""
        self.source, self.outlines = source, outlines
        clustered = [index for index, outline in enumerate(outlines) if outline.is_clustered]
        self.scales = dict(zip(clustered, scales, strict=True))
        self.opened: dict[int, Layer] = {}
        self._one_reader = [Turns() for _ in outlines]

    def __len__(self) -> int:
        return len(self.outlines)

    def __iter__(self) -> Iterator[Layer]:
        """All in order, the next ones being read while one is used."""
        readers = min(READERS, (os.cpu_count() or 1) // 2)
        if readers < 2 or len(self.opened) == len(self):
            yield from (self[index] for index in range(len(self)))
            return
        pool = ThreadPoolExecutor(readers, "squeezed-layers")
        try:
            coming: deque[Future[Layer]] = deque()
            for index in range(len(self)):
                for later in range(index + len(coming), min(index + readers, len(self))):
                    coming.append(pool.submit(self.__getitem__, later))
                yield coming.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    @overload
    def __getitem__(self, index: int) -> Layer: ...

    @overload
    def __getitem__(self, index: slice) -> list[Layer]: ...

    def __getitem__(self, index: int | slice) -> Layer | list[Layer]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        with self._one_reader[index]:
            if index not in self.opened:
                self.opened[index] = self._open(index)
            return self.opened[index]

    def _open(self, index: int) -> Layer:
        outline, tokens = self.outlines[index], self.source.tokens
        tensors = self.source.read(
            layer_file(index, self.source.token), lambda found: check_layer(found, outline, tokens)
        )
        return layer_of(tensors, outline, self.scales.get(index))


class ObservedQueries(Sequence[Tensor]):
    """The observed queries of a saved context, `[Hq, W, D]` per layer, read when first used."""

    def __init__(self, source: _Source, outlines: list[Outline]) -> None:
        self.source, self.outlines = source, outlines
        self.opened: list[Tensor] | None = None
        self._one_reader = Turns()

    def _queries(self) -> list[Tensor]:
        with self._one_reader:
            if self.opened is None:
                name = observed_file(self.source.token)
                known = name in self.source.files
                found = self.source.read(name, self._check) if known else {}
                self.opened = [found[name] for name in sorted(found)]
            return self.opened

    def _check(self, tensors: dict[str, Tensor]) -> None:
        names = {observed_name(i): outline for i, outline in enumerate(self.outlines)}
        if tensors and set(tensors) != set(names):
            raise Malformed("not one tensor for every clustered layer")
        for name, queries in tensors.items():
            outline = names[name]
            heads, observed, _ = queries.shape if queries.dim() == 3 else (0, 0, 0)
            heads = heads if heads % outline.heads == 0 else 0
            sizes = {"query_heads": heads, "observed": observed, "dim": outline.dim}
            check_tensor(name, queries, OBSERVED_QUERIES, sizes, DTYPES[outline.dtype])

    def __len__(self) -> int:
        return len(self._queries())

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        return self._queries()[index]
