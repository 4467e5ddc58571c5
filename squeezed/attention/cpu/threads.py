"""Numba's threads: as many as torch's, one call at a time, started again in a forked child."""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import RLock

import numba
import torch

from squeezed.errors import SqueezedError

ONE_CALL = RLock()
"""Held while kernels run: not every pool of threads is re-entrant."""

POOLS = {
    "omp": "numba.np.ufunc.omppool",
    "tbb": "numba.np.ufunc.tbbpool",
    "workqueue": "numba.np.ufunc.workqueue",
}
"""Numba's threading layers. Each does nothing when it is started again in the same process."""


@contextmanager
def threads() -> Iterator[None]:
    """Numba on as many threads as torch.

    Raises:
        SqueezedError: Numba cannot start its threads.
    """
    with ONE_CALL:
        _start_pool(os.getpid())
        before = numba.get_num_threads()
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
        try:
            yield
        finally:
            numba.set_num_threads(before)


@cache
def _start_pool(process: int) -> None:
    """Start the threads of this process. OpenMP's are torch's own; starting resets their number."""
    count = torch.get_num_threads()
    try:
        numba.get_num_threads()  # loads the layer and starts it, unless a parent did
    except ValueError as error:
        raise SqueezedError(
            f"implementation: Numba's threads do not start ({' '.join(str(error).split())}); check "
            "NUMBA_THREADING_LAYER in the environment, or use 'reference'"
        ) from error
    pool = importlib.import_module(POOLS[numba.threading_layer()])
    ctypes.CFUNCTYPE(None, ctypes.c_int)(pool.launch_threads)(numba.config.NUMBA_NUM_THREADS)
    torch.set_num_threads(count)


if hasattr(os, "register_at_fork"):  # a child must not inherit a lock that somebody holds
    os.register_at_fork(
        before=ONE_CALL.acquire,
        after_in_parent=ONE_CALL.release,
        after_in_child=ONE_CALL.release,
    )
