"""CUDA graphs of whole decoding steps, replayed while a batch stays what it is.

vLLM's own graphs end at every layer's attention where a batch reads contexts: it is launched from
Python there, and the GPU waits at two borders a layer. A batch that only decodes, over the same
contexts by the same rules, is captured as one graph when it comes again.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any

import torch

log = logging.getLogger("squeezed")

WARM_RUNS = 8
"""Steps of a batch that are launched from Python first: kernels are compiled there, and a batch
that seldom comes is not worth its graph."""

MOST = 64
"""Graphs that are kept: each takes some ten megabytes of the GPU besides what vLLM accounts for."""

Replay = Callable[[], Any]


class StepGraphs:
    """Graphs by what they hold: a batch, and the addresses that they read and write.

    Args:
        capture: records what a function launches, without running it; the way to run that, which
            returns what the function returned.
    """

    def __init__(self, capture: Callable[[Callable[[], Any]], Replay]) -> None:
        self.capture = capture
        self.replays: OrderedDict[Hashable, Replay] = OrderedDict()
        self.runs: OrderedDict[Hashable, int] = OrderedDict()
        self.off = False

    def run(self, key: Hashable, compute: Callable[[], Any], launch: Callable[[], Any]) -> Any:
        """What `compute` returns, replayed if it was captured under `key`.

        Args:
            launch: does the same another way, while the batch is new.
        """
        replay = self.replays.get(key) or self._captured(key, compute)
        if replay is None:
            return launch()
        self.replays.move_to_end(key)
        return replay()

    def forget(self) -> None:
        """Drop all: memory that they read is about to be given back."""
        self.replays.clear()
        self.runs.clear()

    def _captured(self, key: Hashable, compute: Callable[[], Any]) -> Replay | None:
        if self.off or self._is_cold(key):
            return None
        try:
            self.replays[key] = self.capture(compute)
        except RuntimeError:
            log.exception("contexts: a step could not be captured; steps are launched as they are")
            self.off = True
            return None
        while len(self.replays) > MOST:
            self.replays.popitem(last=False)
        return self.replays[key]

    def _is_cold(self, key: Hashable) -> bool:
        runs = self.runs[key] = self.runs.pop(key, 0) + 1
        while len(self.runs) > 2 * MOST:
            self.runs.popitem(last=False)
        return runs <= WARM_RUNS


class Captured:
    """Captures what a function launches, in memory that all graphs share: they never overlap.

    Args:
        pool: of the graphs' memory.
        around: entered around a capture; its `stream` is captured.
    """

    def __init__(self, pool: Any, around: Callable[[], AbstractContextManager[Any]]) -> None:
        self.pool, self.around = pool, around

    def __call__(self, compute: Callable[[], Any]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        with self.around():
            # other threads may load contexts meanwhile
            graph.capture_begin(self.pool, capture_error_mode="thread_local")
            try:
                found = compute()
            finally:
                graph.capture_end()

        def replay() -> Any:
            graph.replay()
            return found

        return replay
