"""Writing a saved context: `context.json` and one safetensors file per layer, with checksums; the
observed queries, which only some methods use, lie in a file of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from squeezed.context.record import ContextRecord
from squeezed.context.storage import tensorfile
from squeezed.context.storage.clearing import sweep
from squeezed.context.storage.manifest import listed_files, manifest_text
from squeezed.context.storage.names import (
    MANIFEST,
    layer_file,
    marked,
    observed_file,
    observed_name,
    token_of,
)
from squeezed.context.storage.replacing import Work, work_for
from squeezed.context.storage.strict import Malformed
from squeezed.context.storage.structure import check_layer, tensors_of
from squeezed.errors import ContextFileError, shown

LONGEST_NAME = 248
"""Bytes: a file system's names end at 255, and a context is a directory, which travels as an
archive of its name and `.tar.gz`."""


def save(context: ContextRecord, path: Path) -> Path:
    """Write `context` to the directory `path`, replacing an older context only when complete.

    A link is followed. Whatever ends this, at any moment, leaves the older context or the new one.

    Raises:
        ContextFileError: something else lies there, or it could not be written.
    """
    with _one_line(path):
        target = _proven(path)
        with work_for(target, len(context.outlines) + 1) as work:
            records = dict(_written(context, work))
            work.publish(
                check_saved,
                lambda token: manifest_text(
                    context, {marked(name, token): found for name, found in records.items()}
                ),
            )
    return path


def prove_writable(path: Path) -> None:
    """Raise `ContextFileError` unless a context could be saved at `path`; leaves nothing there.

    Room on the disk is not proved.
    """
    with _one_line(path):
        _proven(path)


def _proven(path: Path) -> Path:
    """The real place of `path`, where a context can be saved."""
    target = resolve(path)
    check_replaceable(target)
    _check_parent(target.parent)
    sweep(target.parent)
    with work_for(target) as trial:
        trial.prove()
    return target


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, Malformed) as error:
        reason = error.strerror or error if isinstance(error, OSError) else error
        raise ContextFileError(
            f"could not save the context to {shown(path)}: {shown(reason)}; free space or choose "
            "another place (an older context there is untouched)"
        ) from error


def _written(context: ContextRecord, work: Work) -> Iterator[tuple[str, dict]]:
    """Write every file that holds tensors; names, bytes and SHA-256."""
    for index, (layer, outline) in enumerate(zip(context.layers, context.outlines, strict=True)):
        tensors = tensors_of(layer)
        check_layer(tensors, outline, len(context.tokens))
        yield _file(work, layer_file(index), tensors, {"kind": outline.kind})
    queries = {observed_name(i): q for i, q in enumerate(context.observed)}
    yield _file(work, observed_file(), queries)


def _file(
    work: Work, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> tuple[str, dict]:
    with work.open(name) as descriptor:
        size, sha256 = tensorfile.write(descriptor, tensors, metadata)
    return name, {"bytes": size, "sha256": sha256}


def resolve(path: Path) -> Path:
    """The real place of `path`, links followed.

    Raises:
        ContextFileError: a path without a name, or with too long a one, or a link to nothing.
    """
    if path.name in ("", "..") or "\0" in str(path):
        raise ContextFileError(
            f"output: {shown(path)} does not name a directory; name one, as in manual.sqz"
        )
    length = len(os.fsencode(path.name))
    if length > LONGEST_NAME:
        raise ContextFileError(
            f"output: expected a name of at most {LONGEST_NAME} bytes, so that NAME.tar.gz is one "
            f"too, got {length}; choose a shorter name"
        )
    real = Path(os.path.realpath(path))
    if path.is_symlink() and not os.path.lexists(real):
        raise ContextFileError(
            f"output: {shown(path)} is a link to {shown(real)}, which does not exist; remove the "
            "link or make the directory that it names"
        )
    return real


def check_replaceable(path: Path) -> None:
    """Raise `ContextFileError` if `path` is there and is not wholly a saved context."""
    if not os.path.lexists(path):
        return
    names = check_saved(path)
    with suppress(FileNotFoundError):
        strange = sorted(x for x in set(os.listdir(path)) - names if token_of(x) is None)
        if strange:
            raise ContextFileError(
                f"{shown(path)} is a saved context and holds {shown(strange[0])}, which does not "
                "belong to it; move that elsewhere or choose another name"
            )


def _check_parent(parent: Path) -> None:
    """Raise `ContextFileError` within a saved context, which could then not be replaced."""
    if os.path.lexists(parent / MANIFEST) and listed_files(parent) is not None:
        raise ContextFileError(
            f"output: {shown(parent)} is a saved context itself; choose a place outside of it"
        )


def check_saved(path: Path) -> set[str]:
    """Names of the files of the saved context at `path`, whose description is replaced.

    Raises:
        ContextFileError: something else lies there.
    """
    try:
        names = listed_files(path)
    except FileNotFoundError:  # removed meanwhile
        return set()
    if names is None:
        raise ContextFileError(
            f"{shown(path)} exists and is not a saved context; choose another name or remove it"
        )
    return names
