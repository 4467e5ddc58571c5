"""A decode step on the CPU in two checkouts, on the same tensors, call by call in turns.

    python benchmarks/cpu_before_after.py OLD NEW --turns 100 --output RECORD

OLD is a checkout of 52f9893, where a layer had no record of its rows and no scale; its benchmark
makes the tensors. Each checkout has a process of its own, and one works while the other waits. A
ratio is that of two calls side by side, so a busy machine hits both alike. Times are those of the
processor, which a busy machine hardly changes.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

CASES = [(kind, far) for kind in ("float32", "bfloat16") for far in ("none", "second_order")]
TOKENS, HEADS, GROUP, DIM, RECENT, BUDGET = 32768, 8, 4, 128, 64, 0.1


def made(kind: str, far: str) -> dict:
    """Tensors of one case, from the older checkout's benchmark."""
    from squeezed.bench.cpu_layer import Sizes, random_layer, rule_for_budget

    torch.manual_seed(0)
    dtype, sizes = getattr(torch, kind), Sizes(HEADS, GROUP, TOKENS, DIM)
    layer, query = random_layer(sizes, dtype), sizes.queries().to(dtype)
    recent = torch.randn(1, HEADS, RECENT, DIM).to(dtype)
    rule = rule_for_budget(query, layer, BUDGET, far, DIM**-0.5)
    levels = [tuple(vars(level).values()) for level in layer.levels]
    return {**vars(layer), "levels": levels, "query": query, "recent": recent, "rule": vars(rule)}


def step_before(case: dict):
    from squeezed.ops import cpu
    from squeezed.rule import SelectionRule
    from squeezed.tree import ClusteredLayer, Level

    names = ("keys", "values", "positions", "pinned", "value_slope")
    parts = {name: case[name] for name in names}
    layer = ClusteredLayer(levels=tuple(Level(*level) for level in case["levels"]), **parts)
    rule, recent = SelectionRule(**case["rule"]), case["recent"]
    return lambda: cpu.attend(case["query"], layer, rule, recent, recent, None, DIM**-0.5)[0]


def step_after(case: dict):
    from squeezed.attention import Suffix, cpu
    from squeezed.context.layers import ClusteredLayer, Level
    from squeezed.context.rows import Rows
    from squeezed.context.rule import SelectionRule

    layer = ClusteredLayer(
        rows=Rows(case["keys"], case["values"]),
        positions=case["positions"],
        pinned=case["pinned"],
        levels=tuple(Level(*level) for level in case["levels"]),
        value_slope=case["value_slope"],
        centre=torch.zeros(HEADS, DIM, dtype=case["keys"].dtype),
        scale=DIM**-0.5,
    )
    rule, suffix = SelectionRule(**case["rule"]), Suffix(case["recent"], case["recent"])
    return lambda: cpu.attend(case["query"], layer, rule, suffix).output


def serve(which: str, folder: Path) -> None:
    """Time one call for every line that names a case."""
    steps = {}
    for kind, far in CASES:
        file = folder / f"{kind}-{far}.pt"
        if which == "before" and not file.exists():
            torch.save(made(kind, far), file)
        case = torch.load(file)
        steps[f"{kind} {far}"] = (step_before if which == "before" else step_after)(case)
        torch.save(steps[f"{kind} {far}"](), folder / f"{kind}-{far}-{which}.pt")
    print("ready", flush=True)
    for line in sys.stdin:
        started = time.process_time()
        steps[line.strip()]()
        print((time.process_time() - started) * 1e6, flush=True)


def worker(which: str, tree: str, folder: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": tree}
    command = [sys.executable, __file__, "--serve", which, folder]
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline().strip() == "ready"
    return process


def timed(process: subprocess.Popen, case: str) -> float:
    print(case, file=process.stdin, flush=True)
    return float(process.stdout.readline())


def compared(old: str, new: str, turns: int) -> list[dict]:
    """Medians and deciles of both checkouts, microseconds, and of their ratios."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        pair = [worker("before", old, folder), worker("after", new, folder)]
        for kind, far in CASES:
            outputs = [torch.load(f"{folder}/{kind}-{far}-{which}.pt") for which in ORDER]
            assert torch.allclose(*(x.float() for x in outputs), atol=1e-2), (kind, far)
            times: list[tuple[float, float]] = []
            for turn in range(turns + 5):
                first = turn % 2  # who begins takes turns too
                found = {i: timed(pair[i], f"{kind} {far}") for i in (first, 1 - first)}
                times.append((found[0], found[1]))
            ratios = sorted(after / before for before, after in times[5:])
            row: dict = {"dtype": kind, "far_field": far}
            for which, column in zip(ORDER, zip(*times[5:], strict=True), strict=True):
                row[which] = {"median_us": statistics.median(column), "least_us": min(column)}
            deciles = statistics.quantiles(ratios, n=10)
            row["ratio"] = {"median": statistics.median(ratios), "low": deciles[0]}
            row["ratio"]["high"] = deciles[-1]
            rows.append(row)
            print(row, flush=True)
        for process in pair:
            process.kill()
    return rows


ORDER = ("before", "after")


def main(old: str, new: str, turns: int, output: str) -> None:
    from squeezed.measure.record import write_record

    rows = compared(old, new, turns)
    write_record(Path(output), {"before": "52f9893", "threads": 1, "turns": turns}, rows, "cpu")


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        torch.set_num_threads(1)
        serve(sys.argv[2], Path(sys.argv[3]))
    else:
        main(sys.argv[1], sys.argv[2], int(sys.argv[4]), sys.argv[6])
