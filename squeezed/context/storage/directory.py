"""A saved context: `context.json` and one safetensors file per layer, with checksums; the
observed queries, which only some methods use, lie in a file of their own.

Everything is written into a hidden place beside the target and put there when complete and on the
disk (`replacing`). Layers are read when first used, once, into private memory, and checked there
(`held`, `structure`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, overload

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from squeezed.context.record import ContextRecord, Layer
from squeezed.context.storage import replacing, tensorfile
from squeezed.context.storage.held import HeldDirectory
from squeezed.context.storage.manifest import (
    MANIFEST,
    MANIFEST_BYTES,
    OBSERVED,
    crafted,
    described,
    layer_file,
    read_manifest,
    unsealed,
    write_manifest,
)
from squeezed.context.storage.strict import Malformed
from squeezed.context.storage.structure import (
    DTYPES,
    OBSERVED_QUERIES,
    Outline,
    check_layer,
    check_tensor,
    layer_of,
    tensors_of,
)
from squeezed.errors import ContextFileError, shown

ATTEMPTS = 1000
"""How often a reader begins again because savers replaced what it was opening."""


def save(context: ContextRecord, path: Path) -> Path:
    """Write `context` to the directory `path`, replacing an older context only when complete.

    A link is followed. Whatever ends this, at any moment, leaves the older context or the new one.

    Raises:
        ContextFileError: something else lies there, or it could not be written.
    """
    with _one_line(path):
        target = replacing.resolve(path)
        check_replaceable(target)
        replacing.sweep(target.parent)
        replacing.prove_writable(target)
        with replacing.place_for(target) as place:
            _write(context, place.new)
            place.publish(lambda older: check_replaceable(older, target))
    return path


def prove_writable(path: Path) -> None:
    """Raise `ContextFileError` unless a context could be saved at `path`; leaves nothing there.

    Room on the disk is not proved.
    """
    with _one_line(path):
        target = replacing.resolve(path)
        check_replaceable(target)
        replacing.prove_writable(target)


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, Malformed) as error:
        reason = error.strerror or error if isinstance(error, OSError) else error
        raise ContextFileError(
            f"could not save the context to {shown(path)}: {shown(reason)}; free space or choose "
            "another place (an older context there is untouched)"
        ) from error


def _write(context: ContextRecord, directory: Path) -> None:
    files = {}
    for index, (layer, outline) in enumerate(zip(context.layers, context.outlines, strict=True)):
        tensors = tensors_of(layer)
        check_layer(tensors, outline, len(context.tokens))
        file = directory / layer_file(index)
        files[file.name] = _write_tensors(file, tensors, {"kind": outline.kind})
    queries = {_observed_name(i): q for i, q in enumerate(context.observed)}
    files[OBSERVED] = _write_tensors(directory / OBSERVED, queries)
    write_manifest(directory, context, files)
    replacing.flush(directory)


def _write_tensors(
    file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> dict:
    """Write a file that lasts, with the rights that its directory has; its bytes and SHA-256."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, file, metadata=metadata)
    os.chmod(file, os.stat(file.parent).st_mode & 0o666)  # safetensors lets only its owner read
    replacing.flush(file)
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def check_replaceable(path: Path, named: Path | None = None) -> None:
    """Raise `ContextFileError` if `path` is there and is not wholly a saved context.

    Args:
        named: where it lies for the user, if it was moved.
    """
    right, strange = True, list[str]()
    for _ in range(ATTEMPTS):
        if not os.path.lexists(path):
            return
        try:
            directory = HeldDirectory(path)
        except FileNotFoundError:  # another saver is replacing it
            continue
        except OSError:
            right = False
            break
        right, strange = _examined(directory)
        if (right and not strange) or directory.is_current():
            break
    if not right:
        raise ContextFileError(
            f"{shown(named or path)} exists and is not a saved context; choose another name or "
            "remove it"
        )
    if strange:
        raise ContextFileError(
            f"{shown(named or path)} is a saved context and holds {shown(strange[0])}, which does "
            "not belong to it; move that elsewhere or choose another name"
        )


def _examined(directory: HeldDirectory) -> tuple[bool, list[str]]:
    """Whether a directory has a context's description, and what the description does not list."""
    try:
        manifest, right = unsealed(_manifest_text(directory), directory.path / MANIFEST)
        return right, sorted(set(directory.names()) - set(manifest["files"]) - {MANIFEST})
    except (OSError, KeyError, TypeError, ContextFileError):
        return False, []


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
    """The directory, which savers on some systems move aside for a moment."""
    for _ in range(ATTEMPTS):
        try:
            return HeldDirectory(path)
        except FileNotFoundError as error:
            if replacing.is_there(Path(os.path.realpath(path))):
                continue
            raise _nothing_there(path) from error
        except NotADirectoryError as error:
            raise _nothing_there(path) from error
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from error
    raise ContextFileError(f"{shown(path)}: replaced again and again; try later")


def _loaded(directory: HeldDirectory, path: Path, device: torch.device) -> ContextRecord:
    file = path / MANIFEST
    if directory.size(MANIFEST) < 0:
        raise _nothing_there(path)
    manifest = read_manifest(_manifest_text(directory), file)
    try:
        fields = described(manifest, device)
    except Malformed as error:
        raise crafted(file, error) from error
    directory.hold(manifest["files"])
    for name, record in manifest["files"].items():
        _check_size(path / name, directory.size(name), record.bytes)
    source = _Source(directory, path, manifest["files"], device, len(manifest["tokens"]))
    return ContextRecord(
        layers=StoredLayers(source, manifest["layers"]),
        observed=ObservedQueries(source, [x for x in manifest["layers"] if x.is_clustered]),
        **fields,
    )


def _manifest_text(directory: HeldDirectory) -> bytes:
    content, _ = directory.read(MANIFEST, MANIFEST_BYTES)
    if len(content) > MANIFEST_BYTES:
        raise OSError(f"{MANIFEST} is larger than {MANIFEST_BYTES} bytes")
    return content.numpy().tobytes()


def _check_size(file: Path, found: int, expected: int) -> None:
    if found != expected:
        what = "no file" if found < 0 else f"{found} bytes"
        raise ContextFileError(
            f"{shown(file)}: expected {expected} bytes, found {what}; the context is damaged, index"
            " the document again"
        )


def _nothing_there(path: Path) -> ContextFileError:
    return ContextFileError(
        f"{shown(path)}: no saved context there ({MANIFEST} is missing); make one with squeezed "
        "index"
    )


def _unreadable(path: Path, error: Exception) -> ContextFileError:
    if isinstance(error, ContextFileError):
        return error
    reason = error.strerror or error if isinstance(error, OSError) else error
    return ContextFileError(
        f"{shown(path)}: could not be read: {shown(reason)}; check its name and your rights to it"
    )


class _Source:
    """Where the tensors of one saved context come from: read once, checked, on its device."""

    def __init__(
        self, directory: HeldDirectory, path: Path, files: dict, device: torch.device, tokens: int
    ) -> None:
        self.directory, self.path, self.files = directory, path, files
        self.device, self.tokens = device, tokens

    def read(self, name: str, check: Any) -> dict[str, Tensor]:
        """The tensors of a file, which `check` may find `Malformed`."""
        file, record = self.path / name, self.files[name]
        try:
            content, sha256 = self.directory.read(name, record.bytes)
            _check_size(file, len(content), record.bytes)
            if sha256 != record.sha256:
                raise ContextFileError(
                    f"{shown(file)}: its checksum is not the one in {MANIFEST}; the file was "
                    "altered, index the document again"
                )
            tensors = tensorfile.tensors_in(content)
            check(tensors)
        except Malformed as error:
            raise crafted(file, error) from error
        except (OSError, RuntimeError, MemoryError) as error:
            raise _unreadable(file, error) from error
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}


class StoredLayers(Sequence[Layer]):
    """The layers of a saved context, each read and checked when first asked for."""

    def __init__(self, source: _Source, outlines: tuple[Outline, ...]) -> None:
        self.source, self.outlines = source, outlines
        self.opened: dict[int, Layer] = {}
        self._one_reader = Lock()

    def __len__(self) -> int:
        return len(self.outlines)

    @overload
    def __getitem__(self, index: int) -> Layer: ...

    @overload
    def __getitem__(self, index: slice) -> list[Layer]: ...

    def __getitem__(self, index: int | slice) -> Layer | list[Layer]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        with self._one_reader:
            if index not in self.opened:
                self.opened[index] = self._open(index)
            return self.opened[index]

    def _open(self, index: int) -> Layer:
        outline, tokens = self.outlines[index], self.source.tokens
        tensors = self.source.read(
            layer_file(index), lambda found: check_layer(found, outline, tokens)
        )
        return layer_of(tensors, outline)


class ObservedQueries(Sequence[Tensor]):
    """The observed queries of a saved context, `[Hq, W, D]` per layer, read when first used."""

    def __init__(self, source: _Source, outlines: list[Outline]) -> None:
        self.source, self.outlines = source, outlines
        self.opened: list[Tensor] | None = None
        self._one_reader = Lock()

    def _queries(self) -> list[Tensor]:
        with self._one_reader:
            if self.opened is None:
                known = OBSERVED in self.source.files
                found = self.source.read(OBSERVED, self._check) if known else {}
                self.opened = [found[name] for name in sorted(found)]
            return self.opened

    def _check(self, tensors: dict[str, Tensor]) -> None:
        names = {_observed_name(i): outline for i, outline in enumerate(self.outlines)}
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


def _observed_name(index: int) -> str:
    return f"layer_{index:03d}"
