"""What the launchers ask a GPU, and what they say when its kernels do not compile."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from triton.errors import TritonError

from squeezed.errors import SqueezedError

HOPPER = 9
REASONS = ("C compiler", "PassManager", "ptxas")
"""In messages of a `RuntimeError` from Triton's own steps."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        multiprocessors: how many it has.
        generation: major number of its compute capability; 0 for the interpreter.
        shared_bytes: most shared memory of one program.
        ptx: whether kernels may hold instructions of NVIDIA's.
    """

    multiprocessors: int
    generation: int
    shared_bytes: int
    ptx: bool = True

    @property
    def overlaps(self) -> bool:
        """Whether a kernel can start while its predecessor drains."""
        return self.generation >= HOPPER

    @property
    def small(self) -> bool:
        """Whether the larger tiles do not fit its shared memory."""
        return self.shared_bytes < 160 << 10

    def two_programs_of_8_warps(self) -> dict[str, int]:
        """Registers that let two fit a multiprocessor: one computes while the other waits."""
        return {"maxnreg": 128} if self.generation else {}


INTERPRETER = Gpu(multiprocessors=2, generation=0, shared_bytes=1 << 30, ptx=False)
"""Runs programs one by one: few suffice."""


@lru_cache(maxsize=16)
def of(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return INTERPRETER
    found: Any = torch.cuda.get_device_properties(device)  # whose stub lacks a field
    shared_bytes, ptx = found.shared_memory_per_block_optin, torch.version.hip is None
    return Gpu(found.multi_processor_count, found.major, shared_bytes, ptx)


@contextmanager
def compiled_or_refused() -> Iterator[None]:
    """Turn a failure of Triton to compile or to launch into one line with a remedy.

    Decorates the launchers.

    Raises:
        SqueezedError: the kernels do not compile, or need more than the GPU has.
    """
    try:
        yield
    except (TritonError, subprocess.CalledProcessError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(part in str(error) for part in REASONS):
            raise  # torch's: out of memory, say
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1] if lines else type(error).__name__
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "the interpreter"
        raise SqueezedError(
            f"implementation: Triton cannot compile its kernels for {name} ({reason[:200]});"
            " install gcc and the triton that torch names, or use implementation='reference'"
        ) from error
