"""What libraries and the system raise, as errors of this package with cause and remedy."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from squeezed.errors import SqueezedError

REMEDIES = {
    errno.ENOENT: "check the path, and whether it was moved or removed meanwhile",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "choose a place that can be written",
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "check the path: one part of it is a file",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOSPC: "free space, or choose another place",
    errno.EDQUOT: "free space, or choose another place",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or choose another place",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs' files",
    errno.ELOOP: "check the links",
}

NO_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "unable to allocate",
    "out of memory",
    "bad_alloc",
    "unable to mmap",
    "can't start new thread",
    "failed to map segment",
)
"""What messages of a failed allocation say: PyTorch's, NumPy's, C++'s, the linker's."""


@contextmanager
def readable_failures() -> Iterator[None]:
    """Raise what `explained` knows as `SqueezedError`; anything else as it is."""
    try:
        yield
    except SqueezedError:
        raise
    except Exception as error:
        known = explained(error)
        if known is None:
            raise
        raise known from error


def explained(error: BaseException) -> SqueezedError | None:
    """The error that says in one line what happened and what to do; `None` for an unknown one."""
    if isinstance(error, SqueezedError):
        return error
    for explain in (_memory, _kernel_cache, _numba_setting, _system, _damaged_file, _encoding):
        found = explain(error)
        if found:
            return SqueezedError(found)
    return None


def cause_of(error: BaseException, longest: int = 240) -> str:
    """What an exception says, on one line; its kind if it says nothing."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
    return text[:longest] or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the CPU or on a GPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    said = str(error).lower()
    return isinstance(error, (RuntimeError, OSError, ImportError)) and any(
        words in said for words in NO_MEMORY
    )


def _memory(error: BaseException) -> str | None:
    if not is_out_of_memory(error):
        return None
    return (
        f"memory: there is not enough ({cause_of(error, 160)}); shorten the document, read it in "
        "smaller chunks, close other programs, or use a smaller model"
    )


def _kernel_cache(error: BaseException) -> str | None:
    """Numba's cache of compiled kernels: damaged, or without a place to lie in."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    caching = [f for f in frames if f.f_code.co_filename.endswith("numba/core/caching.py")]
    if not caching:
        return None
    index = getattr(caching[-1].f_locals.get("self"), "_index_path", None)
    if "no locator available" in str(error) or isinstance(error, OSError):
        return (
            f"implementation: Numba cannot keep its compiled kernels ({cause_of(error)}); set "
            "NUMBA_CACHE_DIR to a directory that can be written, or use 'reference'"
        )
    place = Path(index).parent if index else "the directory named by NUMBA_CACHE_DIR"
    return (
        f"implementation: Numba's cache of compiled kernels is damaged ({cause_of(error)}); remove "
        f"{place} and try again"
    )


def _numba_setting(error: BaseException) -> str | None:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not any(f.f_code.co_filename.endswith("numba/core/config.py") for f in frames):
        return None
    return (
        f"implementation: Numba refuses a setting of its environment ({cause_of(error)}); unset "
        "the variable NUMBA_... that says so"
    )


def _system(error: BaseException) -> str | None:
    if not isinstance(error, OSError) or error.errno is None:
        return None
    remedy = REMEDIES.get(error.errno, "check the path, its permissions and the disk")
    place = f"{error.filename}: " if error.filename else "files: "
    return f"{place}{cause_of(error)}; {remedy}"


def _damaged_file(error: BaseException) -> str | None:
    name = type(error).__name__
    if name not in ("SafetensorError", "EOFError", "UnpicklingError"):
        return None
    return (
        f"files: one cannot be read ({name}: {cause_of(error)}); it is damaged or cut, make or "
        "download it again"
    )


def _encoding(error: BaseException) -> str | None:
    if not isinstance(error, UnicodeError):
        return None
    return f"text: {cause_of(error)}; give text that UTF-8 can hold"
