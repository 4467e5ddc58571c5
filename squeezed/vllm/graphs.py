"""CUDA graphs of one layer's attention, replayed while a batch stays what it is.

Between vLLM's own graph pieces attention is launched from Python, a dozen kernels a layer: at short
contexts that takes longer than the kernels. A batch that only decodes, over the same contexts by
the same rules, is captured per layer when it comes again, and is one launch from then on.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch

log = logging.getLogger("squeezed")

WARM_RUNS = 2
"""Runs of a batch that are launched from Python first: kernels are compiled there."""

MOST = 1024
"""Graphs that are kept, of all layers and batches."""


class LayerGraphs:
    """Graphs by what they hold: a layer, a batch, and the addresses that they read and write."""

    def __init__(self, capture: Callable[[Callable[[], None]], Callable[[], None]] | None = None):
        self.capture = capture or Captured()
        self.replays: OrderedDict[Hashable, Callable[[], None]] = OrderedDict()
        self.runs: OrderedDict[Hashable, int] = OrderedDict()
        self.off = False

    def run(self, key: Hashable, compute: Callable[[], None]) -> None:
        """Run `compute`, or replay what it launched the last time under `key`."""
        replay = self.replays.get(key)
        if replay is None:
            if self.off or self._is_cold(key):
                compute()
                return
            replay = self._captured(key, compute)
            if replay is None:
                return
        self.replays.move_to_end(key)
        replay()

    def forget(self) -> None:
        """Drop all: memory that they read is about to be given back."""
        self.replays.clear()
        self.runs.clear()

    def _is_cold(self, key: Hashable) -> bool:
        runs = self.runs[key] = self.runs.pop(key, 0) + 1
        while len(self.runs) > 2 * MOST:
            self.runs.popitem(last=False)
        return runs <= WARM_RUNS

    def _captured(self, key: Hashable, compute: Callable[[], None]) -> Callable[[], None] | None:
        try:
            replay = self.capture(compute)
        except RuntimeError:
            log.exception("contexts: a layer could not be captured; attention is launched as it is")
            self.off = True
            compute()
            return None
        self.replays[key] = replay
        while len(self.replays) > MOST:
            self.replays.popitem(last=False)
        return replay


class Captured:
    """Captures what a function launches, in memory that all graphs share: they never overlap."""

    def __init__(self) -> None:
        self.own: tuple[Any, torch.cuda.Stream] | None = None  # memory and stream

    def __call__(self, compute: Callable[[], None]) -> Callable[[], None]:
        if self.own is None:
            self.own = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        pool, stream = self.own
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            # other threads may load contexts meanwhile
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                compute()
            finally:
                graph.capture_end()
        current.wait_stream(stream)
        return graph.replay
