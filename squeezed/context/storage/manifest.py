"""`context.json`: everything of a saved context but its tensors, with a checksum.

The checksum notices accidents. It is no signature: a stranger can renew it, so `FIELDS` says what
every value must be, and `described` what they must be together, before anything is made of them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from squeezed.config import ALPHA_RANGE, IndexConfig, Preset
from squeezed.context.calibration import Calibration
from squeezed.context.prompt import PromptTemplate
from squeezed.context.record import ContextRecord
from squeezed.context.storage.older import complete
from squeezed.context.storage.replacing import flush
from squeezed.context.storage.strict import (
    Count,
    Malformed,
    Positive,
    PositiveCount,
    Range,
    Sized,
    conformed,
    grid,
    parsed,
)
from squeezed.context.storage.structure import Outline, check_outline
from squeezed.errors import ContextFileError, shown

FORMAT_VERSION = 6
OLDEST_VERSION = 5
MANIFEST = "context.json"
OBSERVED = "observed_queries.safetensors"
MANIFEST_BYTES = 1 << 28
LONGEST_BLOCK = 1 << 20
"""Most query tokens that select together in a preset from a file."""


@dataclass(frozen=True)
class FileRecord:
    """What a file of the context must be."""

    bytes: Count
    sha256: str


@dataclass(frozen=True)
class SavedCalibration:
    """A calibration with its tensors as nested lists, whose shapes only the layers can tell."""

    preset: Preset
    budgets: tuple[Annotated[float, Range(above=0, high=1)], ...]
    per_token: list
    per_block: list
    alpha: list
    far_alpha: list


Identity = Annotated[str | dict, Sized(1 << 20)]

FIELDS: dict[str, Any] = {
    "format_version": int,
    "model": Identity,
    "tokenizer": Identity,
    "config": IndexConfig,
    "assumed": tuple[str, ...],
    "template": PromptTemplate,
    "windows": tuple[PositiveCount | None, ...],
    "scales": tuple[Positive, ...],
    "seconds": dict[str, Annotated[float, Range(low=0)]],
    "calibrations": dict[str, SavedCalibration],
    "layers": tuple[Outline, ...],
    "files": dict[str, FileRecord],
    "tokens": tuple[Count, ...],
}
"""Every field of the description but its checksum."""


def layer_file(index: int) -> str:
    return f"layer_{index:03d}.safetensors"


def write_manifest(path: Path, context: ContextRecord, files: dict[str, dict]) -> None:
    """Describe `context`, whose tensors lie in `files`, in the directory `path`."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "model": context.model,
        "tokenizer": context.tokenizer,
        "config": asdict(context.config),
        "assumed": list(context.assumed),
        "template": asdict(context.template),
        "windows": list(context.windows),
        "scales": list(context.scales),
        "seconds": context.seconds,
        "calibrations": {
            name: {
                "preset": asdict(calibration.preset),
                "budgets": list(calibration.budgets),
                "per_token": [numbers(x) for x in calibration.per_token],
                "per_block": [numbers(x) for x in calibration.per_block],
                "alpha": [None if a is None else numbers(a) for a in calibration.alpha],
                "far_alpha": [None if a is None else numbers(a) for a in calibration.far_alpha],
            }
            for name, calibration in context.calibrations.items()
        },
        "layers": [asdict(outline) for outline in context.outlines],
        "files": files,
        "tokens": context.tokens.tolist(),
    }
    manifest["checksum"] = _checksum(manifest)
    file = path / MANIFEST
    file.write_text(json.dumps(manifest, indent=1, allow_nan=False), encoding="utf-8")
    flush(file)


def read_manifest(text: bytes, file: Path) -> dict[str, Any]:
    """The description in a file's bytes, every field as `FIELDS` says.

    Raises:
        ContextFileError: no description of a context, altered, or of another format version.
    """
    manifest, right = unsealed(text, file)
    version = manifest["format_version"]
    if not OLDEST_VERSION <= version <= FORMAT_VERSION:
        remedy = "upgrade squeezed" if version > FORMAT_VERSION else "index the document again"
        raise ContextFileError(
            f"{shown(file)}: format version {shown(version)}, this release reads versions "
            f"{OLDEST_VERSION} to {FORMAT_VERSION}; {remedy}"
        )
    if not right:
        raise ContextFileError(
            f"{shown(file)}: its checksum does not match; the file was altered, index the document "
            "again"
        )
    try:
        if version < FORMAT_VERSION:
            complete(manifest)
        wrong = sorted(set(manifest) ^ set(FIELDS))
        if wrong:
            raise Malformed(f"{shown(wrong[0])} is missing or unknown")
        return {name: conformed(manifest[name], hint, name) for name, hint in FIELDS.items()}
    except (Malformed, RecursionError) as error:
        raise crafted(file, error) from error


def unsealed(text: bytes, file: Path) -> tuple[dict[str, Any], bool]:
    """The description of a context of any version, and whether its checksum, taken off, is right.

    Raises:
        ContextFileError: no description of a context.
    """
    try:
        manifest = parsed(text)
        if not isinstance(manifest, dict) or type(manifest.get("format_version")) is not int:
            raise Malformed("no format_version in it")
        checksum = manifest.pop("checksum", None)
        return manifest, checksum == _checksum(manifest)
    except (Malformed, RecursionError) as error:
        raise ContextFileError(
            f"{shown(file)}: not readable as a context's description ({shown(error)}); the file is "
            "damaged, index the document again"
        ) from error


def crafted(file: Path, error: Exception) -> ContextFileError:
    """The error for a file with a right checksum and contents that no context has."""
    return ContextFileError(
        f"{shown(file)}: {shown(error)}; no context looks like that, whatever its checksum says; "
        "do not trust it, index the document again"
    )


def described(manifest: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The fields of a `ContextRecord` that its description holds, if they fit each other.

    Raises:
        Malformed: they do not.
    """
    clustered = _check_layers(manifest)
    names = {layer_file(index) for index in range(len(manifest["layers"]))}
    _require(set(manifest["files"]) - {OBSERVED} == names, "files: not one for every layer")
    calibrations = {
        name: _calibration(saved, name, clustered, device)
        for name, saved in manifest["calibrations"].items()
    }
    same = ("windows", "scales", "config", "assumed", "template", "model", "tokenizer", "seconds")
    return {
        "tokens": torch.tensor(manifest["tokens"], dtype=torch.long),
        "calibrations": calibrations,
        **{name: manifest[name] for name in same},
    }


def _check_layers(manifest: dict[str, Any]) -> list[Outline]:
    """The outlines of the clustered layers, all of one tree's shape."""
    outlines, windows, tokens = (manifest[name] for name in ("layers", "windows", "tokens"))
    for outline in outlines:
        check_outline(outline, len(tokens))
    clustered = [outline for outline in outlines if outline.is_clustered]
    kinds = [window is None for window in windows]
    _require(kinds == [x.is_clustered for x in outlines], "windows: not those of the layers")
    _require(len({(x.pinned, x.nodes) for x in clustered}) == 1, "layers: trees of several shapes")
    _require(len(manifest["scales"]) == len(clustered), "scales: not one for every clustered layer")
    return clustered


def _calibration(
    saved: SavedCalibration, name: str, layers: list[Outline], device: torch.device | str
) -> Calibration:
    preset, budgets = saved.preset, saved.budgets
    rising = bool(budgets) and all(a < b for a, b in pairwise(budgets))
    _require(preset.name == name, f"calibrations.{name}: the preset of another name")
    _require(rising, f"calibrations.{name}.budgets: expected rising shares")
    _require(preset.query_block <= LONGEST_BLOCK, f"calibrations.{name}: too large a query_block")
    found: dict[str, tuple[Tensor | None, ...]] = {}
    for field in ("per_token", "per_block", "alpha", "far_alpha"):
        values, place = getattr(saved, field), f"calibrations.{name}.{field}"
        _require(len(values) == len(layers), f"{place}: not one for every clustered layer")
        read = _thresholds if field.startswith("per_") else _weights
        found[field] = tuple(
            read(value, saved, layer, field, place)
            for value, layer in zip(values, layers, strict=True)
        )
    for alpha, far in zip(found["alpha"], found["far_alpha"], strict=True):
        same = alpha is None or far is None or not len(alpha) or alpha.shape[-1] == far.shape[-1]
        _require(same, f"calibrations.{name}: weights for different numbers of heads")
    placed: dict[str, Any] = {
        field: tuple(None if x is None else x.to(device) for x in values)
        for field, values in found.items()
    }
    return Calibration(preset=preset, budgets=budgets, **placed)


def _thresholds(
    value: Any, saved: SavedCalibration, layer: Outline, field: str, place: str
) -> Tensor:
    shape = (len(saved.budgets), len(layer.nodes), layer.heads)
    return grid(value, shape, Range(), torch.float64, place)


def _weights(
    value: Any, saved: SavedCalibration, layer: Outline, field: str, place: str
) -> Tensor | None:
    """Alpha `[L, Hq]` or far alpha `[Hq]`, exactly where the preset is of second order."""
    far = field == "far_alpha"
    wanted = saved.preset.far_field == "second_order" if far else saved.preset.second_order
    _require((value is not None) == wanted, f"{place}: there exactly where the preset needs it")
    if value is None:
        return None
    row = value if far else next(iter(value), None) if isinstance(value, list) else None
    heads = len(row) if isinstance(row, list) else layer.heads
    _require(heads > 0 and heads % layer.heads == 0, f"{place}: {heads} query heads")
    shape = (heads,) if far else (len(layer.nodes), heads)
    return grid(value, shape, Range(*ALPHA_RANGE), torch.float32, place)


def _require(good: bool, complaint: str) -> None:
    if not good:
        raise Malformed(complaint)


def numbers(tensor: Tensor) -> list:
    """Nested lists with `None` for minus infinity, which JSON cannot hold."""
    return _swapped(tensor.tolist())


def _swapped(nested: Any) -> Any:
    if isinstance(nested, list):
        return [_swapped(item) for item in nested]
    return None if nested == float("-inf") else nested


def _checksum(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
