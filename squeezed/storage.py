"""A saved context: `context.json` and one safetensors file per layer, with checksums; the
observed queries, which only some methods use, lie in a file of their own.

Everything is written under a temporary name and renamed when complete. Layers are memory-mapped
when first used, and checked then.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from squeezed.context import FixedContext, Layer
from squeezed.errors import ContextFileError
from squeezed.manifest import MANIFEST, described, read_manifest, write_manifest
from squeezed.tree import ClusteredLayer, Level, WindowLayer

OBSERVED = "observed_queries.safetensors"


def save(context: FixedContext, path: Path) -> Path:
    """Write `context` to the directory `path`, replacing an older context only when complete."""
    check_replaceable(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        files = {}
        for index, layer in enumerate(context.layers):
            name = f"layer_{index:03d}.safetensors"
            save_file(_layer_tensors(layer), partial / name, metadata=_layer_metadata(layer))
            files[name] = _file_record(partial / name)
        queries = {f"layer_{i:03d}": q.contiguous() for i, q in enumerate(context.observed)}
        save_file(queries, partial / OBSERVED)
        files[OBSERVED] = _file_record(partial / OBSERVED)
        write_manifest(partial, context, files)
        _replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise ContextFileError(
            f"could not save the context to {path}: {error}; free space or choose another place "
            "(an older context there is untouched)"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def check_replaceable(path: Path) -> None:
    """Raise `ContextFileError` if something other than a saved context lies at `path`."""
    if path.exists() and not (path / MANIFEST).exists():
        raise ContextFileError(
            f"{path} exists and is not a saved context; choose another name or remove it"
        )


def load(path: Path, device: torch.device | str = "cpu") -> FixedContext:
    """Open a saved context; layers are read when first used.

    Raises:
        ContextFileError: nothing there, another format version, or a file that was altered or cut.
    """
    manifest = read_manifest(path)
    for name, record in manifest["files"].items():
        size = (path / name).stat().st_size if (path / name).exists() else -1
        if size != record["bytes"]:
            found = "no file" if size < 0 else f"{size} bytes"
            raise ContextFileError(
                f"{path / name}: expected {record['bytes']} bytes, found {found}; the context is "
                "damaged, index the document again"
            )
    place = torch.device(device)
    return FixedContext(
        layers=StoredLayers(path, manifest["files"], place),
        observed=ObservedQueries(path, manifest["files"], place),
        **described(manifest, place),
    )


class StoredLayers(Sequence[Layer]):
    """The layers of a saved context, each checked and memory-mapped when first asked for."""

    def __init__(self, path: Path, files: dict[str, dict], device: torch.device) -> None:
        self.path, self.files, self.device = path, files, device
        self.names = sorted(name for name in files if name != OBSERVED)
        self.opened: dict[int, Layer] = {}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if index not in self.opened:
            self.opened[index] = self._open(self.names[index])
        return self.opened[index]

    def _open(self, name: str) -> Layer:
        return _layer_of(_checked_tensors(self.path / name, self.files[name], self.device))


class ObservedQueries(Sequence[Tensor]):
    """The observed queries of a saved context, `[Hq, W, D]` per layer, read when first used."""

    def __init__(self, path: Path, files: dict[str, dict], device: torch.device) -> None:
        self.path, self.record, self.device = path / OBSERVED, files.get(OBSERVED), device
        self.opened: list[Tensor] | None = None

    def _queries(self) -> list[Tensor]:
        if self.opened is None:
            found = _checked_tensors(self.path, self.record, self.device) if self.record else {}
            self.opened = [found[name] for name in sorted(found)]
        return self.opened

    def __len__(self) -> int:
        return len(self._queries())

    def __getitem__(self, index):
        return self._queries()[index]


def _checked_tensors(file: Path, record: dict, device: torch.device) -> dict[str, Tensor]:
    if _file_record(file)["sha256"] != record["sha256"]:
        raise ContextFileError(
            f"{file}: its checksum is not the one in {MANIFEST}; the file was altered, index "
            "the document again"
        )
    return load_file(file, device=str(device))


def _layer_tensors(layer: Layer) -> dict[str, Tensor]:
    tensors = {"keys": layer.keys, "values": layer.values}
    if isinstance(layer, WindowLayer):
        tensors["window_tokens"] = torch.tensor(layer.tokens)
    else:
        tensors |= {"positions": layer.positions, "pinned": torch.tensor(layer.pinned)}
        tensors |= {"value_slope": layer.value_slope, "centre": layer.centre}
        for depth, level in enumerate(layer.levels):
            for name in LEVEL_FIELDS:
                if getattr(level, name) is not None:
                    tensors[f"level{depth}.{name}"] = getattr(level, name)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


LAYER_FIELDS = ("keys", "values", "positions", "value_slope", "centre")
LEVEL_FIELDS = ("centroids", "mean_values", "variance", "key_offsets", "child_offsets")


def _layer_metadata(layer: Layer) -> dict[str, str]:
    return {"kind": type(layer).__name__}


def _layer_of(tensors: dict[str, Tensor]) -> Layer:
    if "window_tokens" in tensors:
        return WindowLayer(tensors["keys"], tensors["values"], int(tensors["window_tokens"]))
    depth = sum(name.endswith(".centroids") for name in tensors)
    levels = tuple(
        Level(*(tensors.get(f"level{i}.{name}") for name in LEVEL_FIELDS)) for i in range(depth)
    )
    return ClusteredLayer(
        levels=levels,
        pinned=int(tensors["pinned"]),
        **{name: tensors[name] for name in LAYER_FIELDS},
    )


def _file_record(file: Path) -> dict:
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def _replace(partial: Path, path: Path) -> None:
    """Put the finished directory in place; the old one goes last."""
    if not path.exists():
        partial.rename(path)
        return
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    path.rename(old)
    try:
        partial.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
