"""One decode step of one layer against the best dense attention, in CUDA graphs, cold caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from squeezed.attention import reference
from squeezed.attention.interface import Suffix
from squeezed.attention.reference.lookup import lookup
from squeezed.attention.triton.decode import launch as decode
from squeezed.config import FarField
from squeezed.context.layers import ClusteredLayer
from squeezed.context.rule import SelectionRule
from squeezed.errors import SqueezedError
from squeezed.measure.record import write_record
from squeezed.measure.speed.common import (
    copy_bandwidth,
    far_fields_of,
    plot_lines,
    print_table,
    require_gpu,
    rotations,
    time_in_graph,
)
from squeezed.measure.speed.dense import dense_peers, time_or_reason
from squeezed.methods.traffic import step_bytes
from squeezed.testing.layers import Sizes, random_layer, random_queries
from squeezed.testing.rules import rule_for_budget

ORACLE_TOLERANCE = 2e-2
"""Relative error allowed against the float32 reference: bfloat16 rounding, and a cluster that the
rounding of a score moves across the threshold."""


def physical_bytes(query: Tensor, layer: ClusteredLayer, rule: SelectionRule) -> int:
    """Fewest bytes of a step over the context: pinned and kept keys and values, and what finds
    them; no far field. What several requests keep counts once."""
    plain = replace(rule, far_field="none", far_alpha=None)
    return step_bytes(layer, lookup(query, layer, plain), plain)


def oracle_error(
    query: Tensor, layer: ClusteredLayer, rule: SelectionRule, recent: Tensor
) -> float:
    """Relative error of the first two KV heads against the reference; raises if it is too large."""
    heads = slice(0, min(2, layer.keys.shape[0]))
    group = query.shape[1] // layer.keys.shape[0]
    own = recent[:2, heads].contiguous()
    inputs = layer.of_heads(heads), rule.of_heads(heads), Suffix(own, own)
    rows = query[:2, : heads.stop * group].contiguous()
    output = decode.decode_step(rows, *inputs).output
    expected = reference.attend(rows.float(), *inputs).output
    error = float((output - expected).norm() / expected.norm())
    if not error < ORACLE_TOLERANCE:
        raise SqueezedError(f"decode: expected the reference's output, got an error of {error:.3g}")
    return error


def measure(
    sizes: Sizes,
    budget: float,
    far_fields: Sequence[FarField],
    agreement: float,
    coarse_ratio: float,
    bandwidth: float,
    replays: int,
    dense: bool = True,
) -> dict:
    """One case: its bytes, its times, its distance from the limit and from the best dense."""
    held = 4 * sizes.kv_heads * sizes.tokens * sizes.dim
    count = rotations(int(held * min(1.0, 1.2 * budget)), held)
    layers = [random_layer(sizes, seed, "cuda") for seed in range(count)]
    query = random_queries(sizes, agreement, "cuda")
    recent = torch.randn(sizes.batch, sizes.kv_heads, sizes.recent, sizes.dim, device="cuda")
    recent = recent.to(sizes.dtype)
    result: dict[str, Any] = {
        **asdict(sizes),
        "dtype": str(sizes.dtype),
        "budget": budget,
        "agreement": agreement,
    }
    result |= {"coarse_ratio": coarse_ratio, "layers_rotated": count, "methods": {}}
    for far_field in far_fields:
        rules = [rule_for_budget(query, layer, budget, coarse_ratio, far_field) for layer in layers]
        error = oracle_error(query, layers[0], rules[0], recent)
        calls = [
            lambda layer=layer, rule=rule: decode.decode_step(
                query, layer, rule, Suffix(recent, recent)
            )
            for layer, rule in zip(layers, rules, strict=True)
        ]
        read = calls[0]().keys_read.double().mean() / (sizes.kv_heads * layers[0].clustered)
        timing = time_in_graph(calls, replays)
        result["methods"][f"squeezed, far field {far_field}"] = {
            **asdict(timing),
            "oracle_error": error,
            "budget_read": float(read),
        }
    result["physical_bytes"] = physical_bytes(query, layers[0], rules[0])
    result["physical_us"] = result["physical_bytes"] / bandwidth * 1e6
    if dense:
        for name, peer in dense_peers(query, layers).items():
            timed = time_or_reason(peer, replays)
            result["methods"][name] = timed if isinstance(timed, str) else asdict(timed)
    return summarised(result, far_fields[0])


def summarised(result: dict, far_field: str) -> dict:
    """Add the share of the limit, the speed-up over the best dense, and the share of the union."""
    methods = result["methods"]
    ours = methods[f"squeezed, far field {far_field}"]["median_us"]
    peers = {
        name: m["median_us"]
        for name, m in methods.items()
        if isinstance(m, dict) and not name.startswith("squeezed")
    }
    held = 4 * result["kv_heads"] * result["tokens"] * result["dim"]
    result["share_of_limit"] = result["physical_us"] / ours
    result["union_of_keys_and_values"] = result["physical_bytes"] / held
    if peers:
        best = min(peers, key=lambda name: peers[name])
        result |= {"best_dense": best, "best_dense_us": peers[best]}
        result["speed_up"] = peers[best] / ours
    return result


def run(
    contexts: list[int],
    heads: int = 32,
    kv_heads: int = 8,
    dim: int = 128,
    batches: tuple[int, ...] = (1,),
    budget: float = 0.1,
    agreement: float = 0.0,
    coarse_ratio: float = 3.0,
    shares: tuple[float, ...] = (0.01, 0.05),
    far_fields: Sequence[FarField] = ("none", "second_order"),
    keys_kept: int | None = None,
    recent: int = 128,
    replays: int = 30,
    dense: bool = True,
) -> list[dict]:
    """Time every context length and batch; `keys_kept` per head overrides `budget`."""
    require_gpu()
    bandwidth = copy_bandwidth()
    rows = []
    for tokens in contexts:
        for batch in batches:
            sizes = Sizes(heads, kv_heads, dim, tokens, batch, recent, shares=shares)
            share = keys_kept / tokens if keys_kept else budget
            row = measure(
                sizes, share, far_fields, agreement, coarse_ratio, bandwidth, replays, dense
            )
            rows.append(row | {"copy_bytes_per_s": bandwidth})
            torch.cuda.empty_cache()
    return rows


def report(rows: list[dict], far_fields: Sequence[str]) -> None:
    """Print one line per case: microseconds, speed-up over the best dense, share of the limit."""
    header = ["heads", "context", "requests", "read"]
    header += [f"far {f}" for f in far_fields] + ["limit", "of limit", "dense", "by", "speed-up"]
    lines = []
    for row in rows:
        ours = [row["methods"][f"squeezed, far field {f}"] for f in far_fields]
        lines.append(
            [f"{row['kv_heads']}x{row['heads'] // row['kv_heads']}", f"{row['tokens'] // 1024}K"]
            + [row["batch"], f"{ours[0]['budget_read']:.3f}"]
            + [f"{m['median_us']:.1f}" for m in ours]
            + [f"{row['physical_us']:.1f}", f"{row['share_of_limit']:.2f}"]
            + [f"{row.get('best_dense_us', float('nan')):.0f}", row.get("best_dense", "-")]
            + [f"{row.get('speed_up', float('nan')):.2f}"]
        )
    print_table(header, lines)


def plot(rows: list[dict], path: Path, title: str) -> None:
    """Time against context length (or requests, if only they vary), one line per method."""
    axis = "tokens" if len({r["tokens"] for r in rows}) > 1 else "batch"
    names = list(dict.fromkeys(name for row in rows for name in row["methods"]))
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for name in names:
        timed = [r for r in rows if isinstance(r["methods"].get(name), dict)]
        if timed:
            y = [r["methods"][name]["median_us"] for r in timed]
            lines[name] = ([r[axis] for r in timed], y)
    lines["physical limit"] = ([r[axis] for r in rows], [r["physical_us"] for r in rows])
    x_label = "context, tokens" if axis == "tokens" else "requests that share the context"
    plot_lines(path, lines, (title, x_label, "one decode step, one layer, µs"), ["physical limit"])


CONTEXTS, BATCHES, SHARES = [32768, 131072, 524288], [1], [0.01, 0.05]
FAR_FIELDS: list[str] = ["none", "second_order"]


def main(
    contexts: Annotated[list[int], typer.Option(help="Context lengths, tokens.")] = CONTEXTS,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(help="KV heads.")] = 8,
    dim: Annotated[int, typer.Option(help="Head dimension.")] = 128,
    batches: Annotated[list[int], typer.Option(help="Requests that share the context.")] = BATCHES,
    budget: Annotated[float, typer.Option(help="Share of the context's keys read.")] = 0.1,
    keys_kept: Annotated[int, typer.Option(help="Keys read per head; overrides --budget.")] = 0,
    agreement: Annotated[
        float, typer.Option(help="Share of variance that requests' queries share.")
    ] = 0.0,
    coarse_ratio: Annotated[
        float, typer.Option(help="Keys a level keeps, over those of the next.")
    ] = 3.0,
    shares: Annotated[
        list[float], typer.Option(help="Clusters per token, coarse to fine.")
    ] = SHARES,
    far_fields: Annotated[list[str], typer.Option(help="Far fields to time.")] = FAR_FIELDS,
    recent: Annotated[int, typer.Option(help="Recent tokens per request.")] = 128,
    replays: Annotated[int, typer.Option(help="Timed graph replays.")] = 30,
    dense: Annotated[bool, typer.Option(help="Time the dense peers too.")] = True,
    output: Annotated[Path, typer.Option(help="Where to write, without the suffix.")] = Path(
        "decode"
    ),
    at_commit: Annotated[
        str, typer.Option(help="Commit to record where there is no repository.")
    ] = "",
) -> None:
    """Time one decode step against the best dense attention of the same run."""
    settings = dict(locals())
    settings["output"] = str(output)
    rows = run(
        contexts,
        heads,
        kv_heads,
        dim,
        tuple(batches),
        budget,
        agreement,
        coarse_ratio,
        tuple(shares),
        far_fields_of(far_fields),
        keys_kept or None,
        recent,
        replays,
        dense,
    )
    write_record(output.with_suffix(".json"), settings, rows, at_commit=at_commit or None)
    title = f"{kv_heads} KV heads x {heads // kv_heads}, D {dim}, {torch.cuda.get_device_name()}"
    plot(rows, output.with_suffix(".png"), title)
    report(rows, tuple(far_fields))


if __name__ == "__main__":
    typer.run(main)
