"""Result files -> one Markdown table per suite and task, and plots of score against bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from squeezed.errors import SqueezedError
from squeezed.measure.accuracy.meter import ErrorHistogram
from squeezed.measure.accuracy.results import key_of, read_rows

RESAMPLES = 2000
MARKERS = "osv^D*PX<>dh"
ORDER = ("kl", "top1", "nll", "exact")  # first columns; others follow by name


@dataclass
class Cell:
    """One method at one budget on one task.

    Attributes:
        scores: values per question by metric.
        keys_share, bytes_share: per question.
        errors: one histogram per layer.
    """

    scores: dict[str, list[float]] = field(default_factory=dict)
    keys_share: list[float] = field(default_factory=list)
    bytes_share: list[float] = field(default_factory=list)
    errors: list[ErrorHistogram] = field(default_factory=list)

    def add(self, row: dict) -> None:
        for name, value in row["scores"].items():
            self.scores.setdefault(name, []).append(value)
        self.keys_share.append(row["keys_share"])
        self.bytes_share.append(row["bytes_share"])

    def add_errors(self, row: dict) -> None:
        found = [ErrorHistogram.of(record) for record in row["errors"]]
        if not self.errors:
            self.errors = found
            return
        for total, part in zip(self.errors, found, strict=True):
            total.merge(part)

    def error_mean(self) -> float:
        return float(np.mean([layer.mean for layer in self.errors]))

    def worst_p99(self) -> float:
        """The 99th percentile of the layer where it is largest."""
        return max(layer.quantile(0.99) for layer in self.errors)


Table = dict[tuple[str, float], Cell]


def collect(files: Iterable[Path]) -> dict[tuple[str, str], Table]:
    """Suite and task -> method and budget -> cell; several tasks also give the task `all`.

    Files of one suite add up, as when methods ran apart; an answer in two of them counts once.
    """
    tables: dict[tuple[str, str], Table] = {}
    seen: set[tuple] = set()
    for file in files:
        suite = ""
        for row in read_rows(file):
            if row["kind"] == "header":
                suite = f"{row['suite']}, {row['model']}, {row['context_tokens']:,} tokens"
            elif row["kind"] in ("answer", "layers"):
                cell = _cell(tables, suite, row)
                if row["kind"] == "layers":
                    cell.add_errors(row)
                elif (suite, *key_of(row)) not in seen:
                    seen.add((suite, *key_of(row)))
                    cell.add(row)
    if not tables:
        raise SqueezedError("results: expected finished answers, found none; run eval first")
    return tables


def _cell(tables: dict, suite: str, row: dict) -> Cell:
    table = tables.setdefault((suite, row["task"]), {})
    return table.setdefault((row["method"], row["budget"]), Cell())


def with_averages(tables: dict[tuple[str, str], Table]) -> dict[tuple[str, str], Table]:
    """Adds `all` to every suite of several tasks: the tasks' scores as one column, `score`."""
    found = dict(tables)
    for suite in {suite for suite, _ in tables}:
        tasks = [table for (name, _), table in tables.items() if name == suite]
        if len(tasks) < 2:
            continue
        merged: Table = {}
        for table in tasks:
            for key, cell in table.items():
                _merge(merged.setdefault(key, Cell()), cell)
        found[(suite, "all")] = merged
    return found


def _merge(total: Cell, part: Cell) -> None:
    for name, values in part.scores.items():
        shared = name if name in ORDER else "score"
        total.scores.setdefault(shared, []).extend(values)
    total.keys_share += part.keys_share
    total.bytes_share += part.bytes_share


def interval(values: list[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval over questions."""
    array = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(array), (RESAMPLES, len(array)))
    low, high = np.percentile(array[draws].mean(1), [2.5, 97.5])
    return float(array.mean()), float(low), float(high)


def metric_names(table: Table) -> list[str]:
    names = {name for cell in table.values() for name in cell.scores}
    return [n for n in ORDER if n in names] + sorted(names - set(ORDER))


def markdown(tables: dict[tuple[str, str], Table]) -> str:
    """Every table, rows in order of the bytes read."""
    parts = []
    for (suite, task), table in tables.items():
        names = metric_names(table)
        errors = any(cell.errors for cell in table.values())
        head = ["method", "budget", "keys", "bytes", *names, "n"]
        head += ["error, mean", "error, p99 of the worst layer"] if errors else []
        lines = [f"### {suite}: {task}", "", "| " + " | ".join(head) + " |"]
        lines.append("|" + " --- |" * len(head))
        ordered = sorted(table.items(), key=lambda item: np.mean(item[1].bytes_share))
        for (method, budget), cell in ordered:
            lines.append("| " + " | ".join(_row(method, budget, cell, names, errors)) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _row(method: str, budget: float, cell: Cell, names: list[str], errors: bool) -> list[str]:
    row = [method, f"{budget:.1%}"]
    row += [f"{np.mean(share):.1%}" for share in (cell.keys_share, cell.bytes_share)]
    for name in names:
        if name in cell.scores:
            mean, low, high = interval(cell.scores[name])
            row.append(f"{mean:.3f} ({low:.3f}–{high:.3f})")
        else:
            row.append("")
    row.append(str(len(cell.keys_share)))
    if errors:
        row += [f"{cell.error_mean():.3f}", f"{cell.worst_p99():.2f}"] if cell.errors else ["", ""]
    return row


def plot(tables: dict[tuple[str, str], Table], folder: Path) -> list[Path]:
    """One PNG per table and metric: score against bytes read, one line per method."""
    written = []
    for (suite, task), table in tables.items():
        for name in metric_names(table):
            slug = "_".join("".join(c if c.isalnum() else " " for c in f"{suite} {task}").split())
            path = folder / f"{slug}_{name}.png"
            _plot_one(table, name, f"{suite}: {task}", path)
            written.append(path)
    return written


def _plot_one(table: Table, name: str, title: str, path: Path) -> None:
    """Divergences on a logarithmic scale, where dense, which has none, has no place."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    logarithmic = name == "kl"
    for place, method in enumerate(sorted({method for method, _ in table})):
        points = sorted(
            (100 * float(np.mean(cell.bytes_share)), *interval(cell.scores[name]))
            for (m, _), cell in table.items()
            if m == method and name in cell.scores
        )
        points = [point for point in points if point[1] > 0 or not logarithmic]
        if points:
            x, mean, low, high = (np.array(column) for column in zip(*points, strict=True))
            style: dict[str, Any] = {
                "color": f"C{place % 10}",
                "marker": MARKERS[place % len(MARKERS)],
            }
            axes.errorbar(x, mean, [mean - low, high - mean], label=method, capsize=2, **style)
    axes.set(xscale="log", xlabel="bytes of the context read per token, % of dense", ylabel=name)
    axes.set_yscale("log" if logarithmic else "linear")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)


def headers(files: Iterable[Path]) -> list[dict]:
    """How each file was made."""
    rows = (row for file in files for row in read_rows(file))
    return [row for row in rows if row["kind"] == "header"]


def summary(tables: dict[tuple[str, str], Table]) -> list[dict]:
    """Means as plain records, and for every layer the mean and 99th percentile of its error."""
    return [
        {
            "suite": suite,
            "task": task,
            "method": method,
            "budget": budget,
            "keys_share": float(np.mean(cell.keys_share)),
            "bytes_share": float(np.mean(cell.bytes_share)),
            "questions": len(cell.keys_share),
            "scores": {name: interval(values) for name, values in cell.scores.items()},
            "error_mean": [round(layer.mean, 5) for layer in cell.errors],
            "error_p99": [round(layer.quantile(0.99), 4) for layer in cell.errors],
        }
        for (suite, task), table in tables.items()
        for (method, budget), cell in table.items()
    ]
