"""Captured layers in files (`parts`) become a saved context, in a process of its own.

Beside an engine that process has the lowest priority, few threads and no lock in common with the
steps of others: Python's, the compilers' and PyTorch's are its own. It outlives the engine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from squeezed.config import IndexConfig
from squeezed.context.calibration import Calibration
from squeezed.context.captured import CapturedLayer, handed_over
from squeezed.context.layers import ClusteredLayer, WindowLayer
from squeezed.context.prompt import PromptTemplate
from squeezed.context.record import ContextRecord
from squeezed.context.storage.saving import save
from squeezed.errors import SqueezedError
from squeezed.indexing.build import cluster
from squeezed.indexing.calibrate import calibrate
from squeezed.indexing.forest import Forest
from squeezed.system.failures import cause_of, explained
from squeezed.vllm.news import Order
from squeezed.vllm.parts import Parts

TOGETHER = 8
"""Layers that lie in memory twice at most: as captured, and clustered."""

COPIES = 2.0
"""Memory of a GPU that this takes at most, in copies of the document's keys and values."""

LOWEST_PRIORITY = 19


@torch.no_grad()
def make(
    parts: Parts,
    device: torch.device,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> dict[str, Any]:
    """Cluster, calibrate and save; what was captured is removed then.

    Returns:
        `state`, `tokens` and `seconds` by phase.

    Raises:
        SqueezedError: it cannot be done, or another process does it.
    """
    with parts.held():
        order = parts.order
        seconds = {"prefill": parts.seconds(order.ranks)}
        started = time.perf_counter()
        layers, forest = _grown(parts, order, device, progress)
        seconds["cluster"] = time.perf_counter() - started
        started, config = time.perf_counter(), IndexConfig()
        calibrations = {
            preset.name: calibrate(forest, preset, config.budgets, config.calibration)
            for preset in config.presets
        }
        progress("calibrate", 1, 1)
        seconds["calibrate"] = time.perf_counter() - started
        save(_record(order, layers, forest, calibrations, seconds), order.path)
    parts.clear()
    return {"state": "saved", "tokens": order.document_tokens, "seconds": seconds}


def _grown(
    parts: Parts, order: Order, device: torch.device, progress: Callable[[str, int, int], None]
) -> tuple[list[ClusteredLayer | WindowLayer], Forest]:
    """All layers' trees, few layers at a time."""
    captured = parts.layers(order.ranks, order.kv_heads, device)
    layers: list[ClusteredLayer | WindowLayer] = []
    grown: list[Forest] = []
    while some := list(islice(captured, TOGETHER)):
        if not grown:
            check_room(some[0], order.layers)
        found, forest = cluster(handed_over(some), order.document_tokens, IndexConfig().clustering)
        layers += found
        grown.append(forest)
        progress("cluster", len(layers), order.layers)
    joined = [one for forest in grown for one in forest.joined]
    return layers, Forest(tuple(joined), tuple(n for forest in grown for n in forest.layers_in))


def _record(
    order: Order,
    layers: Sequence[ClusteredLayer | WindowLayer],
    forest: Forest,
    calibrations: dict[str, Calibration],
    seconds: dict[str, float],
) -> ContextRecord:
    return ContextRecord(
        tokens=torch.tensor(order.prompt[: order.document_tokens]),
        layers=tuple(layers),
        windows=(None,) * len(layers),
        calibrations=calibrations,
        config=IndexConfig(),
        template=PromptTemplate(**order.template),
        model=order.model,
        tokenizer=order.tokenizer,
        seconds=seconds,
        observed=tuple(seen.queries for seen in forest.layers()),
    )


def check_room(layer: CapturedLayer, layers: int) -> None:
    """Raise `SqueezedError` unless a GPU has memory left for `layers` like this one."""
    if layer.keys.device.type != "cuda":
        return
    needed = COPIES * layers * 2 * layer.keys.numel() * layer.keys.element_size()
    free = torch.cuda.mem_get_info(layer.keys.device)[0]
    if needed > free:
        raise SqueezedError(
            f"indexing needs {needed / 1e9:.1f} GB of the GPU, and {free / 1e9:.1f} GB are left; "
            "lower --gpu-memory-utilization"
        )


def run(parts: Parts, device: str, threads: int) -> dict[str, Any]:
    """`make` in a process of its own, and what it says: `state`, and `why` if that is `failed`."""
    words = [sys.executable, "-m", "squeezed.vllm.making", str(parts.path), device]
    made = subprocess.run(
        words, env=environment(os.environ, threads), capture_output=True, text=True, check=False
    )
    try:
        return json.loads(made.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        said = made.stderr.strip().splitlines() or [f"it ended with status {made.returncode}"]
        return _failed(f"the process that indexes ended ({said[-1]})")


def environment(of_engine: Mapping[str, str], threads: int) -> dict[str, str]:
    """Variables of that process: the engine's, and so many threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    return {**of_engine, **dict.fromkeys(names, str(threads)), "OMP_WAIT_POLICY": "PASSIVE"}


def main(words: list[str]) -> int:
    """Make the context of a directory of parts, and print one line of JSON."""
    os.nice(LOWEST_PRIORITY)
    path, device = words
    try:
        said = make(Parts(Path(path)), torch.device(device))
    except Exception as error:
        known = explained(error)
        said = _failed(str(known or f"{type(error).__name__}: {cause_of(error)}"))
    print(json.dumps(said))
    return 0 if said["state"] == "saved" else 2


def _failed(why: str) -> dict[str, Any]:
    return {"state": "failed", "why": why}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
