"""`compiled`: Numba's `njit` for every kernel, with a cache on disk that never stands in the way.

A cache saves the next run a compilation and nothing else. So a place where none can be written, a
full disk, or a file that somebody cut or changed means compiling again, not an error.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba import config, njit
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.serialize import dumps
from numba.core.sigutils import normalize_signature

from squeezed.errors import SqueezedError
from squeezed.system.places import cache_directories, writable

SOURCES = Path(__file__).parent

log = logging.getLogger("squeezed")


def compiled(function: Callable | None = None, **options: Any) -> Callable:
    """`@compiled` or `@compiled(parallel=True, ...)`: compile at the first call, cached on disk.

    Raises:
        SqueezedError: `NUMBA_DISABLE_JIT` is set; kernels cannot be interpreted.
    """
    if function is None:
        return lambda function: compiled(function, **options)
    if config.DISABLE_JIT:
        raise SqueezedError(
            "implementation: 'cpu' is compiled by Numba, which NUMBA_DISABLE_JIT forbids; remove "
            "that variable from the environment, or use 'reference'"
        )
    dispatcher = njit(**options)(function)
    if kernel_directory() is not None:
        dispatcher._cache = KernelCache(function)
    return dispatcher


@cache
def kernel_directory() -> Path | None:
    """Where compiled kernels are kept; `None` if no place can be written."""
    own = "kernels-" + hashlib.sha256(str(SOURCES).encode()).hexdigest()[:16]  # of this copy
    chosen = [Path(config.CACHE_DIR) / own] if config.CACHE_DIR else []
    others = (directory / own for directory in cache_directories())
    found = writable([*chosen, SOURCES / "__pycache__", *others])
    if found is None:
        log.info(
            "kernels are compiled in every run; name a directory in SQUEEZED_CACHE to keep them"
        )
    return found


@cache
def sources_digest() -> bytes:
    """SHA-256 of all kernels' sources: a compiled kernel holds every function that it calls."""
    found = hashlib.sha256()
    for source in sorted(SOURCES.glob("*.py")):
        found.update(source.read_bytes())
    return found.digest()


class _Place:
    """Where a function's kernels are kept and how old they may be, as Numba asks for it."""

    def __init__(self, py_func: Callable, py_file: str) -> None:
        self._py_file, self._line = py_file, py_func.__code__.co_firstlineno

    @classmethod
    def from_function(cls, py_func: Callable, py_file: str) -> _Place:
        return cls(py_func, py_file)

    def ensure_cache_path(self) -> None:
        Path(self.get_cache_path()).mkdir(parents=True, exist_ok=True)

    def get_cache_path(self) -> str:
        return str(kernel_directory())

    def get_source_stamp(self) -> bytes:
        return sources_digest()

    def get_disambiguator(self) -> str:
        return str(self._line)


class _Kernel(CompileResultCacheImpl):
    """A compiled kernel with its checksum: altered machine code must not run."""

    _locator_classes = (_Place,)

    def reduce(self, cres: Any) -> tuple[bytes, bytes]:
        packed = dumps(super().reduce(cres))
        return hashlib.sha256(packed).digest(), packed

    def rebuild(self, target_context: Any, reduced_data: tuple[bytes, bytes]) -> Any:
        digest, packed = reduced_data
        if hashlib.sha256(packed).digest() != digest:
            raise ValueError("a cached kernel was altered")
        return super().rebuild(target_context, pickle.loads(packed))


class KernelCache(FunctionCache):
    """Numba's cache of one function, whose failures mean that there is nothing in it."""

    _impl_class = _Kernel

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            found = super().load_overload(sig, target_context)
            if found is None or found.signature.args == normalize_signature(sig)[0]:
                return found
        except Exception as error:  # pickle raises nearly anything for a damaged file
            log.info("a cached kernel cannot be read and is compiled again: %r", error)
        self._forget()
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:
            log.info("a compiled kernel cannot be cached: %r", error)

    def _forget(self) -> None:
        """Empty the index, which may be what is damaged: saving reads it first."""
        try:
            self.flush()
        except Exception as error:
            log.info("a damaged cache cannot be replaced: %r", error)
