"""Descriptions of version 5, which did not say every number that shaped a context."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from squeezed.config import CalibrationConfig, SpaceConfig
from squeezed.context.storage.strict import Malformed


def complete(manifest: dict[str, Any]) -> None:
    """Fill in what the releases that wrote version 5 took, and name it under `assumed`.

    Should a default change, its old value belongs here.

    Raises:
        Malformed: it says already what version 5 does not know, or has no place for it.
    """
    config = _object(manifest, "config", "config")
    clustering = _object(config, "clustering", "config.clustering")
    unsaid = (
        (clustering, "config.clustering", "space", asdict(SpaceConfig())),
        (clustering, "config.clustering", "common_part", 2.0),
        (config, "config", "calibration", asdict(CalibrationConfig())),
    )
    for record, place, name, value in unsaid:
        _fill(record, name, value, f"{place}.{name}")
    _fill(manifest, "assumed", [f"{place}.{name}" for _, place, name, _ in unsaid], "assumed")


def _object(record: dict[str, Any], name: str, place: str) -> dict[str, Any]:
    if not isinstance(record.get(name), dict):
        raise Malformed(f"{place}: expected an object")
    return record[name]


def _fill(record: dict[str, Any], name: str, value: Any, place: str) -> None:
    if name in record:
        raise Malformed(f"{place}: unknown in version 5")
    record[name] = json.loads(json.dumps(value))  # lists for tuples, as in a file
