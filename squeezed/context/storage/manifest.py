"""`context.json`: everything of a saved context but its tensors, with a checksum.

The checksum notices accidents. What a description with a right one must hold stands in
`description`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from squeezed.context.record import ContextRecord
from squeezed.context.storage.description import FIELDS
from squeezed.context.storage.held import HeldDirectory
from squeezed.context.storage.names import MANIFEST
from squeezed.context.storage.older import complete
from squeezed.context.storage.strict import Malformed, conformed, parsed
from squeezed.errors import ContextFileError, shown

FORMAT_VERSION = 8
OLDEST_VERSION = 5
MANIFEST_BYTES = 1 << 28


def manifest_text(context: ContextRecord, files: dict[str, dict]) -> bytes:
    """The description of `context`, whose tensors lie in `files`."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "model": context.model,
        "tokenizer": context.tokenizer,
        "config": asdict(context.config),
        "assumed": list(context.assumed),
        "template": asdict(context.template),
        "windows": list(context.windows),
        "scales": [layer.scale for layer in context.clustered_layers],
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
        "pieces": list(context.pieces),
        "trees": [asdict(tree) for tree in context.trees],
        "history": [asdict(change) for change in context.history],
        "rows_loss": [list(of_layer) for of_layer in context.rows_loss],
        "tokens": context.tokens.tolist(),
    }
    manifest["checksum"] = _checksum(manifest)
    return json.dumps(manifest, indent=1, allow_nan=False).encode()


def stored_text(directory: HeldDirectory) -> bytes:
    """The bytes of the description in a directory."""
    content, _ = directory.read(MANIFEST, MANIFEST_BYTES)
    if len(content) > MANIFEST_BYTES:
        raise OSError(f"{MANIFEST} is larger than {MANIFEST_BYTES} bytes")
    return content.numpy().tobytes()


def listed_files(path: Path) -> set[str] | None:
    """Names of the files of a saved context of any version; `None` if something else lies there.

    Raises:
        FileNotFoundError: nothing does.
    """
    try:
        directory = HeldDirectory(path)
    except FileNotFoundError:
        raise
    except OSError:
        return None
    try:
        manifest, right = unsealed(stored_text(directory), directory.path / MANIFEST)
        return {MANIFEST, *manifest["files"]} if right else None
    except (OSError, TypeError, KeyError, ContextFileError):
        return None


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


def numbers(tensor: Tensor) -> list:
    """Nested lists with `None` for minus infinity, which JSON cannot hold."""
    return _swapped(tensor.tolist())


def _swapped(nested: Any) -> Any:
    if isinstance(nested, list):
        return [_swapped(item) for item in nested]
    return None if nested == float("-inf") else nested


def _checksum(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
