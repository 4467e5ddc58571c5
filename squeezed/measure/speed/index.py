"""Index build on the GPU: clustering, sorting and statistics of every layer, then calibration.

The time is that of everything after prefill, by the functions that `squeezed.index` calls. Every
layer has keys of its own (`squeezed.testing.parts`), drawn before.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer

from squeezed.config import PRESETS, IndexConfig
from squeezed.context.captured import CapturedLayer, handed_over
from squeezed.indexing.build import cluster
from squeezed.indexing.calibrate import calibrate
from squeezed.measure.record import write_record
from squeezed.measure.speed.common import print_table, require_gpu
from squeezed.testing.parts import Parts

Result = TypeVar("Result")

WARM_LAYERS = 4  # as many as are worked on together at 32K tokens


@dataclass(frozen=True)
class Shape:
    """The attention of a model: layers, query heads, KV heads, head dimension."""

    layers: int
    heads: int
    kv_heads: int
    dim: int


def captured_layers(shape: Shape, context: int, probe: int) -> list[CapturedLayer]:
    """What prefill leaves: keys and values in buffers with room for a probe, and its queries."""
    layers = []
    for number in range(shape.layers):
        parts = Parts.of(shape.kv_heads, shape.dim, "cuda", seed=number)
        keys = parts.keys(context + probe, torch.bfloat16)
        values = torch.randn(
            keys.shape, dtype=keys.dtype, device=keys.device, generator=parts.generator
        )
        queries = parts.queries(probe, shape.heads // shape.kv_heads, keys.dtype)[0]
        layers.append(
            CapturedLayer(keys[:, :context], values[:, :context], queries, shape.dim**-0.5)
        )
    return layers


def timed(work: Callable[[], Result]) -> tuple[Result, float, int]:
    """What `work` returns, its seconds, and the peak of extra memory in bytes."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return result, seconds, torch.cuda.max_memory_allocated() - before


def measure(shape: Shape, context: int, presets: list[str]) -> dict:
    """One context length."""
    config = IndexConfig()
    captured = captured_layers(shape, context, config.clustering.pinned_last)
    (_, forest), seconds, peak = timed(
        lambda: cluster(handed_over(captured), context, config.clustering)
    )
    kv_bytes = sum(seen.layer.kv_bytes() for seen in forest.joined)
    row: dict[str, Any] = {
        "context": context,
        "layers": shape.layers,
        "cluster_s": seconds,
        "index_share_of_kv": sum(seen.layer.index_bytes() for seen in forest.joined) / kv_bytes,
        "calibrate_s": {},
    }
    for preset in presets:
        calibrate_one = partial(calibrate, forest, PRESETS[preset], config.budgets)
        _, row["calibrate_s"][preset], extra = timed(calibrate_one)
        peak = max(peak, extra)
    row["total_s"] = seconds + sum(row["calibrate_s"].values())
    row["peak_extra_share_of_kv"] = peak / kv_bytes
    return row


def run(contexts: list[int], shape: Shape, presets: list[str]) -> list[dict]:
    """One record per context length, each measured after a run with few layers that warms up."""
    require_gpu()
    rows = []
    for context in contexts:
        measure(replace(shape, layers=WARM_LAYERS), context, presets)
        rows.append(measure(shape, context, presets))
        torch.cuda.empty_cache()
    return rows


def report(rows: list[dict], presets: list[str]) -> None:
    header = ["context", "layers", "cluster s", *[f"calibrate {p} s" for p in presets], "total s"]
    lines = [
        [f"{r['context'] // 1024}K", r["layers"], f"{r['cluster_s']:.2f}"]
        + [f"{r['calibrate_s'][p]:.2f}" for p in presets]
        + [f"{r['total_s']:.2f}", f"{r['peak_extra_share_of_kv']:.3f}"]
        + [f"{r['index_share_of_kv']:.3f}"]
        for r in rows
    ]
    print_table([*header, "peak extra / KV", "index / KV"], lines)


CONTEXTS, CALIBRATED = [32768, 131072], ["best", "paper"]


def main(
    contexts: Annotated[list[int], typer.Option(help="Context lengths, tokens.")] = CONTEXTS,
    layers: Annotated[int, typer.Option(help="Attention layers.")] = 32,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(help="KV heads.")] = 8,
    dim: Annotated[int, typer.Option(help="Head dimension.")] = 128,
    presets: Annotated[list[str], typer.Option(help="Presets to calibrate.")] = CALIBRATED,
    output: Annotated[Path, typer.Option(help="Where to write, without the suffix.")] = Path(
        "index"
    ),
    at_commit: Annotated[
        str, typer.Option(help="Commit to record where there is no repository.")
    ] = "",
) -> None:
    """Time the index build of a model's attention layers, everything after prefill."""
    settings = dict(locals()) | {"output": str(output)}
    rows = run(contexts, Shape(layers, heads, kv_heads, dim), presets)
    write_record(output.with_suffix(".json"), settings, rows, at_commit=at_commit or None)
    report(rows, presets)


if __name__ == "__main__":
    typer.run(main)
