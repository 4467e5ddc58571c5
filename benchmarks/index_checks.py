"""Clustering and calibration of one fixed input, with and without the checks for NaN and infinity.

    python benchmarks/index_checks.py --output benchmarks/index_checks.json

Random keys and values of the usual shape, in one process, in turns: once as this package indexes,
once with the checks taken out. Times are the processor's, so that other work on the machine does
not count. The checks read every number once; clustering compares each with more clusters the longer
the document is: so their share falls with its length. They are timed alone, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from squeezed.config import BEST, PAPER, IndexConfig
from squeezed.context.captured import CapturedLayer
from squeezed.indexing import build
from squeezed.indexing.calibrate import calibrate
from squeezed.indexing.finite import check_captured
from squeezed.measure.record import about_run

KV_HEADS, GROUP, DIM, PROBE, SCALE = 8, 4, 128, 64, 128**-0.5


def captured(tokens: int, seed: int = 0) -> CapturedLayer:
    """A layer whose keys lie around a few hundred directions, in bfloat16."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    centres = normal(KV_HEADS, 400, DIM)
    place = torch.randint(0, 400, (tokens,), generator=generator)
    keys = centres[:, place] + 0.5 * normal(KV_HEADS, tokens, DIM)
    queries = 2 * normal(KV_HEADS * GROUP, PROBE, DIM)
    values = normal(KV_HEADS, tokens, DIM)
    return CapturedLayer(*(x.bfloat16() for x in (keys, values, queries)), SCALE)


def index(layer: CapturedLayer, tokens: int) -> None:
    config = IndexConfig()
    _, forest = build.cluster([layer], tokens, config.clustering)
    for preset in (PAPER, BEST):
        calibrate(forest, preset, config.budgets, config.calibration)


def unchecked(layers: object, tokens: int) -> None:
    pass


def processor_seconds(action: Callable[[], None]) -> float:
    started = time.process_time()
    action()
    return time.process_time() - started


def in_turns(tokens: int, repeats: int) -> dict[str, list[float]]:
    """Processor seconds of every run, with the checks and without."""
    layer = captured(tokens)
    found: dict[str, list[float]] = {"checked": [], "unchecked": []}
    for repeat in range(repeats + 1):
        order = ("checked", "unchecked") if repeat % 2 else ("unchecked", "checked")
        for name in order:
            build.check_captured = check_captured if name == "checked" else unchecked
            taken = processor_seconds(lambda: index(layer, tokens))
            if repeat:  # the first one warms up
                found[name].append(round(taken, 4))
            print(repeat, name, f"{taken:.2f} s", file=sys.stderr)
    build.check_captured = check_captured
    return found


def alone(tokens: int, repeats: int) -> float:
    """Processor seconds of the checks of one layer, the median."""
    layer = captured(tokens)
    check_captured([layer], tokens)
    return statistics.median(
        processor_seconds(lambda: check_captured([layer], tokens)) for _ in range(repeats)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--long", type=int, default=131072, help="tokens of the checks alone")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    runs = in_turns(given.tokens, given.repeats)
    medians = {name: statistics.median(times) for name, times in runs.items()}
    checks = {str(n): alone(n, 3 * given.repeats) for n in (given.tokens, given.long)}
    record = about_run("cpu") | {
        "processors": os.cpu_count(),
        "load": os.getloadavg()[0],
        "layer": {"kv_heads": KV_HEADS, "dim": DIM, "tokens": given.tokens, "dtype": "bfloat16"},
        "processor_seconds": runs,
        "median": medians,
        "checked_to_unchecked": round(medians["checked"] / medians["unchecked"], 4),
        "checks_alone_seconds": {n: round(x, 5) for n, x in checks.items()},
        "checks_share": round(checks[str(given.tokens)] / medians["checked"], 5),
    }
    text = json.dumps(record, indent=1)
    print(text)
    if given.output:
        given.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
