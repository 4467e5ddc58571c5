"""Descriptions of older versions: 5 did not say every number that shaped a context, 6 not how it
grew, and 7 not how rows are written, for none grew and all were plain.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from squeezed.config import CalibrationConfig, SpaceConfig
from squeezed.context.storage.strict import Malformed


def complete(manifest: dict[str, Any]) -> None:
    """Fill in what the version that wrote a description did not say; one of today is left alone.

    Raises:
        Malformed: it says already what its version does not know, or has no place for it.
    """
    version = manifest["format_version"]
    if version < 6:
        _complete_settings(manifest)
    if version < 7:
        for name in ("pieces", "trees", "history"):
            _fill(manifest, name, [], name, version)
    if version < 8:
        _complete_rows(manifest, version)


def _complete_rows(manifest: dict[str, Any], version: int) -> None:
    config = _object(manifest, "config", "config")
    _fill(config, "rows", "plain", "config.rows", version)
    _fill(manifest, "rows_loss", [], "rows_loss", version)
    layers = manifest.get("layers")
    for outline in layers if isinstance(layers, list) else []:
        if not isinstance(outline, dict):
            raise Malformed("layers: expected objects")
        _fill(outline, "encoding", "plain", "layers.encoding", version)


def _complete_settings(manifest: dict[str, Any]) -> None:
    """Fill in what the releases that wrote version 5 took, and name it under `assumed`.

    Should a default change, its old value belongs here.
    """
    config = _object(manifest, "config", "config")
    clustering = _object(config, "clustering", "config.clustering")
    unsaid = (
        (clustering, "config.clustering", "space", asdict(SpaceConfig())),
        (clustering, "config.clustering", "common_part", 2.0),
        (config, "config", "calibration", asdict(CalibrationConfig())),
    )
    for record, place, name, value in unsaid:
        _fill(record, name, value, f"{place}.{name}", 5)
    _fill(manifest, "assumed", [f"{place}.{name}" for _, place, name, _ in unsaid], "assumed", 5)


def _object(record: dict[str, Any], name: str, place: str) -> dict[str, Any]:
    if not isinstance(record.get(name), dict):
        raise Malformed(f"{place}: expected an object")
    return record[name]


def _fill(record: dict[str, Any], name: str, value: Any, place: str, version: int) -> None:
    if name in record:
        raise Malformed(f"{place}: unknown in version {version}")
    record[name] = json.loads(json.dumps(value))  # lists for tuples, as in a file
