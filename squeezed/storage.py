"""A saved context: `context.json` and one safetensors file per layer, with checksums; the
observed queries, which only some methods use, lie in a file of their own.

Everything is written under a temporary name and renamed when complete. Layers are memory-mapped
when first used, and checked then.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from squeezed.calibration import Calibration
from squeezed.config import ClusteringConfig, IndexConfig, Preset
from squeezed.context import FixedContext, Layer
from squeezed.errors import ContextFileError
from squeezed.prompt import PromptTemplate
from squeezed.tree import ClusteredLayer, Level, WindowLayer

FORMAT_VERSION = 2
MANIFEST = "context.json"
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
        manifest = _manifest(context, files)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
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
    manifest = _read_manifest(path)
    for name, record in manifest["files"].items():
        size = (path / name).stat().st_size if (path / name).exists() else -1
        if size != record["bytes"]:
            found = "no file" if size < 0 else f"{size} bytes"
            raise ContextFileError(
                f"{path / name}: expected {record['bytes']} bytes, found {found}; the context is "
                "damaged, index the document again"
            )
    index = manifest["config"]
    return FixedContext(
        tokens=torch.tensor(manifest["tokens"], dtype=torch.long),
        layers=StoredLayers(path, manifest["files"], torch.device(device)),
        windows=tuple(manifest["windows"]),
        scales=tuple(manifest["scales"]),
        calibrations={
            name: _calibration(saved, device) for name, saved in manifest["calibrations"].items()
        },
        config=IndexConfig(
            clustering=ClusteringConfig(**_tuples(index["clustering"])),
            presets=tuple(Preset(**preset) for preset in index["presets"]),
            budgets=tuple(index["budgets"]),
            prefill_chunk=index["prefill_chunk"],
        ),
        template=PromptTemplate(**manifest["template"]),
        model=manifest["model"],
        tokenizer=manifest["tokenizer"],
        seconds=manifest["seconds"],
        observed=ObservedQueries(path, manifest["files"], torch.device(device)),
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
        for depth, level in enumerate(layer.levels):
            for name in LEVEL_FIELDS:
                if getattr(level, name) is not None:
                    tensors[f"level{depth}.{name}"] = getattr(level, name)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


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
        tensors["keys"], tensors["values"], tensors["positions"], int(tensors["pinned"]), levels
    )


def _manifest(context: FixedContext, files: dict[str, dict]) -> dict:
    manifest = {
        "format_version": FORMAT_VERSION,
        "model": context.model,
        "tokenizer": context.tokenizer,
        "config": asdict(context.config),
        "template": asdict(context.template),
        "windows": list(context.windows),
        "scales": list(context.scales),
        "seconds": context.seconds,
        "calibrations": {
            name: {
                "preset": asdict(calibration.preset),
                "budgets": list(calibration.budgets),
                "per_token": [_numbers(grid) for grid in calibration.per_token],
                "per_block": [_numbers(grid) for grid in calibration.per_block],
                "alpha": [None if a is None else _numbers(a) for a in calibration.alpha],
            }
            for name, calibration in context.calibrations.items()
        },
        "files": files,
        "tokens": context.tokens.tolist(),
    }
    return manifest | {"checksum": _manifest_checksum(manifest)}


def _calibration(saved: dict, device) -> Calibration:
    return Calibration(
        preset=Preset(**saved["preset"]),
        budgets=tuple(saved["budgets"]),
        per_token=_grids(saved["per_token"]),
        per_block=_grids(saved["per_block"]),
        alpha=tuple(
            None if a is None else torch.tensor(a, dtype=torch.float32, device=device)
            for a in saved["alpha"]
        ),
    )


def _numbers(tensor: Tensor) -> list:
    """Nested lists with `None` for minus infinity, which JSON cannot hold."""
    rows = tensor.cpu().tolist()
    return [[None if x == float("-inf") else x for x in row] for row in rows]


def _grids(layers: list) -> Tensor:
    values = [[[float("-inf") if x is None else x for x in row] for row in grid] for grid in layers]
    return torch.tensor(values, dtype=torch.float64)


def _tuples(record: dict) -> dict:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in record.items()}


def _read_manifest(path: Path) -> dict:
    file = path / MANIFEST
    if not file.is_file():
        raise ContextFileError(
            f"{path}: no saved context there ({MANIFEST} is missing); make one with squeezed index"
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version, checksum = manifest["format_version"], manifest.pop("checksum", None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ContextFileError(
            f"{file}: not readable as a context's description; the file is damaged, index the "
            "document again"
        ) from error
    if version != FORMAT_VERSION:
        raise ContextFileError(
            f"{file}: format version {version}, this release reads version {FORMAT_VERSION}; "
            "index the document again"
        )
    if checksum != _manifest_checksum(manifest):
        raise ContextFileError(
            f"{file}: its checksum does not match; the file was altered, index the document again"
        )
    return manifest


def _manifest_checksum(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


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
