"""`context.json`: everything of a saved context but its tensors, with a checksum."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from squeezed.calibration import Calibration
from squeezed.config import ClusteringConfig, IndexConfig, Preset
from squeezed.context import FixedContext
from squeezed.errors import ContextFileError
from squeezed.prompt import PromptTemplate

FORMAT_VERSION = 5
MANIFEST = "context.json"


def write_manifest(path: Path, context: FixedContext, files: dict[str, dict]) -> None:
    """Describe `context`, whose tensors lie in `files`, in the directory `path`."""
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
                "per_token": [numbers(grid) for grid in calibration.per_token],
                "per_block": [numbers(grid) for grid in calibration.per_block],
                "alpha": [None if a is None else numbers(a) for a in calibration.alpha],
                "far_alpha": [None if a is None else numbers(a) for a in calibration.far_alpha],
            }
            for name, calibration in context.calibrations.items()
        },
        "files": files,
        "tokens": context.tokens.tolist(),
    }
    manifest["checksum"] = _checksum(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def read_manifest(path: Path) -> dict:
    """The description of the context at `path`, or `ContextFileError`."""
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
    if checksum != _checksum(manifest):
        raise ContextFileError(
            f"{file}: its checksum does not match; the file was altered, index the document again"
        )
    return manifest


def described(manifest: dict, device: torch.device | str) -> dict:
    """The fields of a `FixedContext` that its description holds."""
    index = manifest["config"]
    return {
        "tokens": torch.tensor(manifest["tokens"], dtype=torch.long),
        "windows": tuple(manifest["windows"]),
        "scales": tuple(manifest["scales"]),
        "calibrations": {
            name: _calibration(saved, device) for name, saved in manifest["calibrations"].items()
        },
        "config": IndexConfig(
            clustering=ClusteringConfig(**_tuples(index["clustering"])),
            presets=tuple(Preset(**preset) for preset in index["presets"]),
            budgets=tuple(index["budgets"]),
            prefill_chunk=index["prefill_chunk"],
        ),
        "template": PromptTemplate(**manifest["template"]),
        "model": manifest["model"],
        "tokenizer": manifest["tokenizer"],
        "seconds": manifest["seconds"],
    }


def _calibration(saved: dict, device) -> Calibration:
    return Calibration(
        preset=Preset(**saved["preset"]),
        budgets=tuple(saved["budgets"]),
        per_token=_grids(saved["per_token"], device),
        per_block=_grids(saved["per_block"], device),
        alpha=_weights(saved["alpha"], device),
        far_alpha=_weights(saved["far_alpha"], device),
    )


def numbers(tensor: Tensor) -> list:
    """Nested lists with `None` for minus infinity, which JSON cannot hold."""
    return _swapped(tensor.tolist(), float("-inf"), None)


def _grids(layers: list, device: torch.device | str) -> tuple[Tensor, ...]:
    grids = [_swapped(grid, None, float("-inf")) for grid in layers]
    return tuple(torch.tensor(grid, dtype=torch.float64, device=device) for grid in grids)


def _weights(layers: list, device: torch.device | str) -> tuple[Tensor | None, ...]:
    return tuple(
        None if a is None else torch.tensor(a, dtype=torch.float32, device=device) for a in layers
    )


def _swapped(nested: list | float | None, old: float | None, new: float | None):
    """Nested lists with every `old` replaced."""
    if isinstance(nested, list):
        return [_swapped(item, old, new) for item in nested]
    return new if nested == old else nested


def _tuples(record: dict) -> dict:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in record.items()}


def _checksum(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
