"""`squeezed inspect`: what a saved context holds and what a question reads of it."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from squeezed.cli import options
from squeezed.cli.ask import check_question
from squeezed.cli.console import emit, megabytes
from squeezed.cli.options import DEFAULTS
from squeezed.cli.session import open_session

if TYPE_CHECKING:
    from squeezed.hf.asking import Asking

QUESTION = "What is this document about?"


def inspect(
    context: Annotated[Path, typer.Argument(help="A saved context.")],
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Write a .png: measured budget by layer and head, sizes."),
    ] = None,
    question: Annotated[
        str, typer.Option("--question", help="Asked to measure the budget for --plot.")
    ] = QUESTION,
    model: options.Model = DEFAULTS["model"],
    budget: options.Budget = DEFAULTS["budget"],
    preset: options.PresetName = DEFAULTS["preset"],
    json: options.Json = False,
) -> None:
    """Show tokens, levels, cluster sizes, thresholds and bytes of a saved context.

    --plot asks one question, with the model that made the context, and measures.
    """
    import squeezed
    from squeezed.costs.inspection import check_picture, describe
    from squeezed.hf.asking import Asking

    asking = Asking(budget, preset, "auto", "squeezed")
    question = check_question(question, 1)
    if plot:
        check_picture(plot)
    opened = squeezed.load(context)
    opened.calibration(preset)
    record = {"context": str(context)} | describe(opened)
    if plot:
        measured = _plot(context, model, asking, question, plot)
        record["budget_by_layer_and_head"] = measured
        record["plot"] = str(plot)
    if json:
        emit(record)
    else:
        _show(record, preset)


def _plot(
    path: Path, model: str, asking: Asking, question: str, picture: Path
) -> list[list[float]]:
    from squeezed.answers.reading import budget_by_head
    from squeezed.cli.plot import plot

    with open_session(path, model, "auto", "auto") as (session, context):
        answer = session.ask(context, question, **vars(asking), watch=True, max_new_tokens=24)
        assert answer.watched is not None
        budgets = budget_by_head(context, answer.watched)
        plot(context, budgets, picture)
    return [[round(share, 4) for share in row] for row in budgets.tolist()]


def _span(thresholds: tuple[float | None, ...]) -> str:
    """One level's thresholds over all heads: one number, or from the lowest to the highest."""
    low, high = ("keep all" if x is None else f"{x:.2f}" for x in _lowest_and_highest(thresholds))
    return low if low == high else f"{low} to {high}"


def _lowest_and_highest(thresholds: tuple[float | None, ...]) -> tuple[float | None, float | None]:
    known = [x for x in thresholds if x is not None]
    low = None if len(known) < len(thresholds) else min(known)
    return low, max(known, default=None)


def written(rows: str, loss: dict | None) -> str:
    if loss is None:
        return (
            f"rows as {rows}; what that costs was not measured, for nobody kept a probe's queries"
        )
    return (
        f"rows as {rows}: outputs on the probe are {loss['mean']:.2%} off, at most "
        f"{loss['largest']:.2%} (layer {loss['layer']}, KV head {loss['head']})"
    )


def _show(record: dict, preset: str) -> None:
    print(
        f"{record['context']}: {record['tokens']:,} tokens, {record['clustered_layers']} of "
        f"{record['layers']} layers clustered, {record['kv_heads']} KV heads of "
        f"{record['head_dim']} numbers ({record['dtype']}), {record['pinned_tokens']} pinned tokens"
    )
    print(
        f"keys and values {megabytes(record['kv_bytes'])}, index "
        f"{megabytes(record['index_bytes'])} ({record['overhead']:.1%} on top)"
    )
    if record["rows"] != "plain":
        print(written(record["rows"], record["rows_loss"]))
    for depth, level in enumerate(record["levels"], 1):
        keys = level["keys_per_node"]
        print(
            f"level {depth}: {level['nodes_per_head']} nodes per head; keys per node: mean "
            f"{keys['mean']:.1f}, median {keys['median']:.0f}, 99th percentile {keys['p99']:.0f}, "
            f"largest {keys['largest']}; {keys['empty']} empty"
        )
    rules = record["presets"][preset]
    print(f"log thresholds of one token, preset {preset}, coarse to fine:")
    for budget, *layers in zip(rules["budgets"], *rules["per_token"], strict=True):
        levels = zip(*layers, strict=True)  # of every layer its heads
        values = ", ".join(_span(tuple(chain(*level))) for level in levels)
        print(f"  budget {budget:.1%}: {values}")
    print("made in " + ", ".join(f"{name} {s:.1f} s" for name, s in record["seconds"].items()))
    if "plot" in record:
        print(f"plot: {record['plot']}")
