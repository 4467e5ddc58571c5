"""Kernels beside others: launched into a second stream, which a CUDA graph holds as a branch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Beside:
    """A second stream of this rank; without one, everything runs in its turn."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self.stream = stream

    @contextmanager
    def __call__(self, wanted: bool) -> Iterator[Callable[[], None]]:
        """What is launched inside runs beside what follows; the result waits for it.

        Memory that is taken inside may be read outside after that wait: the stream goes on only
        behind all that was launched before.
        """
        stream = self.stream if wanted else None
        if stream is None:
            yield lambda: None
            return
        current = torch.cuda.current_stream(stream.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            yield lambda: current.wait_stream(stream)
