"""Prefill of user tokens over a long context, lookup included, against the best dense attention.

The context is clustered for real; its keys, and the queries, come from `squeezed.testing.parts`.
Dense peers run in the same process (`squeezed.measure.speed.dense`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from squeezed.attention import reference
from squeezed.attention.triton.prefill.launch import prefill
from squeezed.config import FarField
from squeezed.context.rule import SelectionRule
from squeezed.errors import SqueezedError
from squeezed.measure.record import write_record
from squeezed.measure.speed.common import (
    Timing,
    far_fields_of,
    print_table,
    require_gpu,
    time_in_graph,
)
from squeezed.measure.speed.dense import prefill_peers, time_or_reason
from squeezed.measure.speed.prefill_cases import Case, Inputs, rule_for
from squeezed.testing.rules import with_far_field

ORACLE_TOLERANCE = 2e-2
"""Relative error allowed against the float32 reference: bfloat16 rounding, and a cluster that the
rounding of a score moves across the threshold."""


def oracle_error(inputs: Inputs, rule: SelectionRule) -> float:
    """Relative error of the first and the last KV head against the reference; raises if large.

    Only the last block of queries is compared: the reference holds all scores at once.
    """
    worst, rows = 0.0, rule.query_block
    output, _, _ = prefill(*inputs.arguments(rule))
    group = inputs.query.shape[1] // inputs.layer.keys.shape[0]
    for index in (0, inputs.layer.keys.shape[0] - 1):
        part = inputs.head(index)
        part = replace(part, query=part.query[:, :, -rows:])
        own = rule.of_heads(slice(index, index + 1))
        expected, _, _ = reference.attend(*part.arguments(own))
        ours = output[:, index * group : (index + 1) * group, -rows:].double()
        worst = max(worst, float((ours - expected).norm() / expected.double().norm()))
    if not worst < ORACLE_TOLERANCE:
        raise SqueezedError(
            f"prefill: expected the reference's output, got an error of {worst:.3g}"
        )
    return worst


def dense_times(inputs: Inputs, replays: int) -> dict[str, Timing]:
    """The dense peers over context and suffix, those that take the shape."""
    keys = torch.cat([inputs.layer.keys[None], inputs.suffix.keys], 2)
    values = torch.cat([inputs.layer.values[None], inputs.suffix.values], 2)
    found = {}
    for name, call in prefill_peers(inputs.query, keys, values).items():
        timing = time_or_reason([call], replays)
        if isinstance(timing, Timing):
            found[name] = timing
        else:
            typer.echo(f"{name}: {timing}", err=True)
    return found


def measure(inputs: Inputs, case: Case, far_fields: Sequence[FarField], replays: int) -> dict:
    """Check against the reference, then time ours and the dense peers."""
    rule = rule_for(inputs, case)
    row: dict[str, Any] = asdict(case) | {"methods": {}, "budget_read": inputs.share_read(rule)}
    for far_field in far_fields:
        ruled = with_far_field(rule, far_field, inputs.query)
        error = oracle_error(inputs, ruled)
        timing = time_in_graph([partial(prefill, *inputs.arguments(ruled))], replays)
        row["methods"][f"squeezed, far field {far_field}"] = asdict(timing) | {"error": error}
    dense = dense_times(inputs, replays)
    row["methods"] |= {name: asdict(timing) for name, timing in dense.items()}
    best = min(dense, key=lambda name: dense[name].median_us)
    ours = row["methods"][f"squeezed, far field {far_fields[0]}"]["median_us"]
    flop = 4 * case.dim * case.rows * case.heads * inputs.layer.tokens
    row |= {
        "best_dense": best,
        "best_dense_us": dense[best].median_us,
        "speed_up": dense[best].median_us / ours,
        "dense_tflops": flop / dense[best].median_us / 1e6,
        "ours_tflops_of_kept": flop * row["budget_read"] / ours / 1e6,
    }
    return row


def run(
    contexts: list[int],
    rows: list[int],
    heads: int,
    kv_heads: int,
    dim: int,
    budget: float,
    query_blocks: list[int],
    far_fields: Sequence[FarField],
    replays: int,
) -> list[dict]:
    """One record per context, number of user tokens and block of queries."""
    require_gpu()
    records = []
    for context in contexts:
        whole = Inputs.of(Case(context, max(rows), heads, kv_heads, dim, budget, 1))
        for count in rows:
            inputs = whole.first(count)
            for block in query_blocks:
                case = Case(context, count, heads, kv_heads, dim, budget, block)
                records.append(measure(inputs, case, far_fields, replays))
        del whole, inputs
        torch.cuda.empty_cache()
    return records


def report(records: list[dict], far_fields: Sequence[str]) -> None:
    header = ["heads", "context", "tokens", "block", "read", *[f"far {f}" for f in far_fields]]
    lines = [
        [f"{r['kv_heads']}x{r['heads'] // r['kv_heads']}", f"{r['context'] // 1024}K", r["rows"]]
        + [r["query_block"], f"{r['budget_read']:.3f}"]
        + [f"{r['methods'][f'squeezed, far field {f}']['median_us']:.0f}" for f in far_fields]
        + [f"{r['best_dense_us']:.0f}", r["best_dense"], f"{r['speed_up']:.2f}"]
        for r in records
    ]
    print_table([*header, "dense", "by", "speed-up"], lines)


CONTEXTS, ROWS, BLOCKS = [32768, 131072], [128, 1024], [128]
FAR_FIELDS: list[str] = ["none", "second_order"]


def main(
    contexts: Annotated[list[int], typer.Option(help="Context lengths, tokens.")] = CONTEXTS,
    rows: Annotated[list[int], typer.Option(help="User tokens.")] = ROWS,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(help="KV heads.")] = 32,
    dim: Annotated[int, typer.Option(help="Head dimension.")] = 128,
    budget: Annotated[float, typer.Option(help="Share of the clustered keys read.")] = 0.1,
    query_blocks: Annotated[list[int], typer.Option(help="Tokens that select together.")] = BLOCKS,
    far_fields: Annotated[list[str], typer.Option(help="Far fields to time.")] = FAR_FIELDS,
    replays: Annotated[int, typer.Option(help="Timed graph replays.")] = 15,
    output: Annotated[Path, typer.Option(help="Where to write, without the suffix.")] = Path(
        "prefill"
    ),
    at_commit: Annotated[
        str, typer.Option(help="Commit to record where there is no repository.")
    ] = "",
) -> None:
    """Time prefill of user tokens over a squeezed context against the best dense attention."""
    settings = dict(locals()) | {"output": str(output)}
    records = run(
        contexts,
        rows,
        heads,
        kv_heads,
        dim,
        budget,
        query_blocks,
        far_fields_of(far_fields),
        replays,
    )
    write_record(output.with_suffix(".json"), settings, records, at_commit=at_commit or None)
    report(records, tuple(far_fields))


if __name__ == "__main__":
    typer.run(main)
