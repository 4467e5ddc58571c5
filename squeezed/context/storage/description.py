"""What a context's description must hold: each field by itself, and all of them together.

The checksum of a description is no signature: a stranger can renew it. So `FIELDS` says what every
value must be, and `described` what they must be together, before anything is made of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import torch
from torch import Tensor

from squeezed.config import ALPHA_RANGE, IndexConfig, Preset
from squeezed.context.calibration import Calibration
from squeezed.context.growth import Change, Tree
from squeezed.context.prompt import PromptTemplate
from squeezed.context.storage.names import common_token, layer_file, observed_file
from squeezed.context.storage.outline import Outline
from squeezed.context.storage.strict import (
    Count,
    Malformed,
    Positive,
    PositiveCount,
    Range,
    Sized,
    grid,
)
from squeezed.context.storage.structure import check_outline

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
"""Of a model or tokenizer; `squeezed.hf.identity` says what is in it."""
TokenId = Annotated[int, Range(low=0, high=2**31 - 1)]

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
    "pieces": tuple[PositiveCount, ...],
    "trees": tuple[Tree, ...],
    "history": tuple[Change, ...],
    "rows_loss": tuple[tuple[Annotated[float, Range(low=0)], ...], ...],
    "tokens": tuple[TokenId, ...],
}
"""Every field of the description but its checksum."""


def described(manifest: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The fields of a `ContextRecord` that its description holds, if they fit each other.

    Raises:
        Malformed: they do not.
    """
    clustered = _check_layers(manifest)
    _check_growth(manifest, clustered[0])
    _check_rows(manifest, clustered)
    token = common_token(manifest["files"]) or ""
    names = {layer_file(index, token) for index in range(len(manifest["layers"]))}
    known = set(manifest["files"]) - {observed_file(token)}
    _require(known == names, "files: not one for every layer")
    calibrations = {
        name: _calibration(saved, name, clustered, device)
        for name, saved in manifest["calibrations"].items()
    }
    same = ["windows", "config", "assumed", "template", "model", "tokenizer", "seconds"]
    same += ["pieces", "trees", "history", "rows_loss"]
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


def _check_rows(manifest: dict[str, Any], layers: list[Outline]) -> None:
    """All rows are written alike, and what that costs is said of every head or of none."""
    _require(len({x.encoding for x in layers}) == 1, "layers: rows written in several ways")
    heads = [len(of_layer) for of_layer in manifest["rows_loss"]]
    wanted = [layer.heads for layer in layers]
    _require(heads in ([], wanted), "rows_loss: not one for every head")


def _check_growth(manifest: dict[str, Any], layer: Outline) -> None:
    """Pieces, trees and history are those of so many tokens, rows and nodes, or left out."""
    tokens, pieces, trees = len(manifest["tokens"]), manifest["pieces"], manifest["trees"]
    _require(not pieces or sum(pieces) == tokens, "pieces: not all of the tokens")
    if trees:
        rows = sum(tree.tokens for tree in trees)
        _require(rows == layer.rows - layer.pinned, "trees: not all of the clustered rows")
        depths = {len(tree.nodes) for tree in trees}
        _require(depths == {len(layer.nodes)}, "trees: of other depths than the layers")
        nodes = tuple(map(sum, zip(*(tree.nodes for tree in trees), strict=True)))
        _require(nodes == layer.nodes, "trees: not all of the nodes")
    for change in manifest["history"]:
        _require(change.seconds >= 0, "history: a time below zero")


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
