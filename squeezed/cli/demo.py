"""`squeezed demo`: three questions about a real document, dense beside squeezed."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from squeezed.cli import options
from squeezed.cli.console import emit, index_progress, megabytes, note, quiet_libraries
from squeezed.cli.options import DEFAULTS
from squeezed.cli.streams import Output
from squeezed.config import PRESETS
from squeezed.context.text import printable
from squeezed.measure.record import about_run

Quick = Annotated[
    bool, typer.Option("--quick", help="The document's first quarter and one question: a minute.")
]


def demo(
    model: options.Model = DEFAULTS["model"],
    budget: options.Budget = DEFAULTS["budget"],
    preset: options.PresetName = DEFAULTS["preset"],
    implementation: options.Implementation = DEFAULTS["implementation"],
    dtype: options.Dtype = DEFAULTS["dtype"],
    device: options.Device = DEFAULTS["device"],
    quick: Quick = False,
    json: options.Json = False,
) -> None:
    """Index SQLite's write-ahead-log manual, ask three questions with dense and squeezed."""
    from squeezed import Session
    from squeezed.demo.run import run_demo
    from squeezed.hf.asking import Asking

    asking = Asking(budget, preset, implementation)
    asking.check_preset(PRESETS)
    quiet_libraries()
    with Session.of(model, dtype, device, note) as session, index_progress() as progress:
        done = run_demo(session, asking, progress, quick)
        about = about_run(session.model.device)
    record = {"model": model, "preset": preset, "machine": about} | done.record()
    if json:
        emit(record)
    else:
        _show(record)


def _show(record: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_lines=True, caption_justify="left")
    for name in ("question", "attention", "answer", "keys read", "KV read per token"):
        table.add_column(name, overflow="fold")
    for name in ("same tokens", "KL, nats", "first token", "per token"):
        table.add_column(name, justify="right")
    for row in record["asked"]:
        table.add_row(*map(printable, table_row(row)))
    times = ", ".join(f"{name} {s:.1f} s" for name, s in record["index_seconds"].items())
    table.caption = (
        f"{record['tokens']:,} tokens of {record['document']}, {megabytes(record['kv_bytes'])} of "
        f"keys and values, {megabytes(record['index_bytes'])} of index; {times}; "
        f"everything {record['seconds']:.0f} s"
    )
    width = None if sys.stdout.isatty() else 160
    output: Any = sys.stdout.with_styles() if isinstance(sys.stdout, Output) else sys.stdout
    Console(file=output, width=width, markup=False, emoji=False).print(table)


def table_row(row: dict) -> list[str]:
    """One answer as the table's cells."""
    agreement = row["agreement"]
    return [
        row["question"],
        "dense" if row["budget_asked"] == 1 else f"squeezed {row['budget_asked']:.0%}",
        row["answer"],
        f"{row['budget_spent']:.1%}",
        megabytes(row["bytes_per_token"]),
        f"{agreement['identical']:.0%}",
        f"{agreement['kl']:.4f}",
        f"{row['seconds']['first_token']:.2f} s",
        f"{row['seconds']['per_token'] * 1e3:.0f} ms",
    ]
