"""Index build on the GPU: clustering, sorting and statistics of every layer, then calibration.

The time is that of everything after prefill. Layers are indexed one after the other, each with its
own keys (`squeezed.bench.synthetic`); drawing them is not timed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from squeezed.bench.common import print_table, require_gpu, write_record
from squeezed.bench.synthetic import Parts
from squeezed.calibration import calibrate
from squeezed.clustering import cluster_layer
from squeezed.config import PRESETS, IndexConfig
from squeezed.thresholds import ObservedLayer


@dataclass(frozen=True)
class Shape:
    """The attention of a model: layers, query heads, KV heads, head dimension."""

    layers: int
    heads: int
    kv_heads: int
    dim: int


def cluster_layers(
    shape: Shape, context: int, config: IndexConfig
) -> tuple[list[ObservedLayer], float, int]:
    """Cluster every layer: the layers, seconds in all, and the peak of extra memory in bytes."""
    seen, seconds, peak = [], 0.0, 0
    for number in range(shape.layers):
        parts = Parts.of(shape.kv_heads, shape.dim, "cuda", seed=number)
        keys = parts.keys(context, torch.bfloat16)
        values = torch.randn_like(keys)
        queries = parts.queries(
            config.clustering.pinned_last, shape.heads // shape.kv_heads, keys.dtype
        )
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        layer = cluster_layer(keys, values, config.clustering, queries[0])
        torch.cuda.synchronize()
        seconds += time.perf_counter() - started
        peak = max(peak, torch.cuda.max_memory_allocated() - before)
        seen.append(ObservedLayer(layer, queries[0], shape.dim**-0.5))
        del keys, values
    return seen, seconds, peak


def calibration_seconds(
    seen: list[ObservedLayer], config: IndexConfig, preset: str
) -> tuple[float, int]:
    """Seconds to calibrate one preset, and the peak of extra memory in bytes."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    calibrate(seen, PRESETS[preset], config.budgets)
    torch.cuda.synchronize()
    return time.perf_counter() - started, torch.cuda.max_memory_allocated() - before


def measure(shape: Shape, context: int, presets: list[str], calibrated_layers: int) -> dict:
    """One context length. Calibration is linear in layers; a few of them stand for all."""
    config = IndexConfig()
    seen, seconds, peak = cluster_layers(shape, context, config)
    kv_bytes = sum(s.layer.kv_bytes() for s in seen)
    row = {
        "context": context,
        "layers": shape.layers,
        "cluster_s": seconds,
        "calibrated_layers": min(calibrated_layers, shape.layers),
        "index_share_of_kv": sum(s.layer.index_bytes() for s in seen) / kv_bytes,
        "calibrate_s": {},
    }
    some = seen[: row["calibrated_layers"]]
    for preset in presets:
        calibration_seconds(some[:1], config, preset)  # warm up
        taken, extra = calibration_seconds(some, config, preset)
        row["calibrate_s"][preset] = taken * shape.layers / len(some)
        peak = max(peak, extra)
    row["total_s"] = seconds + sum(row["calibrate_s"].values())
    row["peak_extra_share_of_kv"] = peak / kv_bytes
    return row


def run(
    contexts: list[int], shape: Shape, presets: list[str], calibrated_layers: int
) -> list[dict]:
    """One record per context length."""
    require_gpu()
    cluster_layers(Shape(1, shape.heads, shape.kv_heads, shape.dim), 8192, IndexConfig())  # warm up
    rows = []
    for context in contexts:
        rows.append(measure(shape, context, presets, calibrated_layers))
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


def main(
    contexts: Annotated[list[int], typer.Option(help="Context lengths, tokens.")] = (32768, 131072),
    layers: Annotated[int, typer.Option(help="Attention layers.")] = 32,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(help="KV heads.")] = 8,
    dim: Annotated[int, typer.Option(help="Head dimension.")] = 128,
    presets: Annotated[list[str], typer.Option(help="Presets to calibrate.")] = ("best", "paper"),
    calibrated_layers: Annotated[
        int, typer.Option(help="Layers that are calibrated; the time is scaled to all.")
    ] = 32,
    output: Annotated[Path, typer.Option(help="Where to write, without the suffix.")] = Path(
        "index"
    ),
    at_commit: Annotated[
        str, typer.Option(help="Commit to record where there is no repository.")
    ] = "",
) -> None:
    """Time the index build of a model's attention layers, everything after prefill."""
    settings = dict(locals()) | {"output": str(output)}
    rows = run(contexts, Shape(layers, heads, kv_heads, dim), presets, calibrated_layers)
    write_record(output.with_suffix(".json"), settings, rows, at_commit or None)
    report(rows, presets)


if __name__ == "__main__":
    typer.run(main)
