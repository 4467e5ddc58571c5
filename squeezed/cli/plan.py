"""`squeezed plan`: what a context would cost, from the model's configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from squeezed.cli import options
from squeezed.cli.console import emit, note, quiet_libraries
from squeezed.cli.options import DEFAULTS, index_config
from squeezed.config import PRESETS, check_budget, check_rows
from squeezed.errors import SqueezedError

if TYPE_CHECKING:
    from squeezed.costs.plan import Plan

UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def plan(
    model: Annotated[
        str, typer.Argument(help="Model directory, config.json, .gguf file, hub name, or demo.")
    ],
    context: Annotated[int, typer.Option("--context", "-c", help="Length in tokens.")] = 131072,
    budget: options.Budget = DEFAULTS["budget"],
    preset: options.PresetName = DEFAULTS["preset"],
    levels: options.Levels = DEFAULTS["levels"],
    rows: options.RowsOption = DEFAULTS["rows"],
    bandwidth: Annotated[
        float, typer.Option("--bandwidth", help="Memory bandwidth in GB/s (H200: 4270 copied).")
    ] = 4270.0,
    json: options.Json = False,
) -> None:
    """Work out memory, clustering and bytes per token of a context without running a model."""
    from squeezed.costs import plan as planning
    from squeezed.costs.shape import model_shape
    from squeezed.hf.loading import load_config

    check_budget(budget)
    if preset not in PRESETS:
        raise SqueezedError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    written = check_rows(rows)
    clustering = index_config(levels, DEFAULTS["iterations"], DEFAULTS["chunk"]).clustering
    quiet_libraries()
    shape = model_shape(load_config(model, note))
    asked = budget, bandwidth * 1e9, clustering, PRESETS[preset], written
    found = planning.plan(shape, context, *asked)
    if json:
        emit({"model": model, "preset": preset} | found.record())
    else:
        _show(model, found)


def _show(model: str, found: Plan) -> None:
    shape = found.shape
    windows = f" and {shape.window_layers} sliding over {shape.window}" if shape.window else ""
    print(
        f"{model}: {shape.full_layers} full-attention layers{windows}, {shape.heads} heads, "
        f"{shape.kv_heads} KV heads of {shape.head_dim}, {shape.parameters / 1e6:,.0f} M weights"
    )
    rows = (
        ("context", f"{found.tokens:,} tokens"),
        ("keys and values", size(found.kv_bytes) + _written(found)),
        ("index on top", f"{size(found.index_bytes)} ({found.index_bytes / found.kv_bytes:.1%})"),
        (
            "clustering",
            f"{found.clustering_flops / 1e12:.3g} TFLOP "
            f"({found.clustering_flops / found.prefill_flops:.2%} of the document's prefill)",
        ),
        ("read per token, dense", size(found.dense_bytes_per_token)),
        (f"read per token at {found.budget:.1%}", size(found.squeezed_bytes_per_token)),
        ("speed-up, attention", f"{found.attention_speedup:.1f} x"),
        (
            "speed-up, whole token",
            f"{found.token_speedup:.1f} x ({found.dense_ms:.2f} -> {found.squeezed_ms:.2f} ms at "
            f"{found.bandwidth / 1e9:,.0f} GB/s, weights {size(found.weight_bytes)})",
        ),
    )
    for name, value in rows:
        print(f"  {name:<24} {value}")
    print("  speed-ups are what the bytes allow; one request, one token")


def _written(found: Plan) -> str:
    if found.rows == "plain":
        return ""
    share = found.kv_bytes / found.dense_bytes_per_token
    return f" as {found.rows}, {share:.1%} of plain; squeezed index measures what that costs"


def size(count: float) -> str:
    """Bytes with a decimal unit."""
    for unit, factor in UNITS:
        if count >= factor:
            return f"{count / factor:,.2f} {unit}"
    return f"{count:.0f} B"
