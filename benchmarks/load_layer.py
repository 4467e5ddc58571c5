"""Opening a layer of a saved context: safely, and as a mapped file would be, in turns.

    python benchmarks/load_layer.py --place /dev/shm --output benchmarks/load_layer.json

The mapped way hashes the file, then maps it: what is mapped may change after the check, and its
content is not checked. This package reads the file once into memory of its own, hashes it in a
second thread, and checks every number meanwhile. "Used" adds one sum over keys and values, for a
mapped file is only read then. Times are medians of runs in turns, and the share is that of medians.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from squeezed.config import IndexConfig
from squeezed.context.layers import ClusteredLayer, Level
from squeezed.context.prompt import PromptTemplate
from squeezed.context.record import ContextRecord
from squeezed.context.rows import Rows
from squeezed.context.storage.directory import load
from squeezed.context.storage.names import layer_file
from squeezed.context.storage.saving import save
from squeezed.context.storage.structure import check_layer, tensors_of
from squeezed.measure.record import commit

HEADS, DIM, PINNED = 8, 128, 116


def random_numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float32).to(torch.bfloat16)


def record(tokens: int) -> ContextRecord:
    """A context of one layer: random keys, and a tree of the usual sizes over them."""
    nodes = (tokens // 100, tokens // 20)
    ends = [torch.linspace(PINNED, tokens, count + 1).int() for count in nodes]
    children = torch.linspace(0, nodes[1], nodes[0] + 1).int()
    ends[0] = ends[1][children.long()]
    levels = tuple(
        Level(
            random_numbers(HEADS, count, DIM),
            random_numbers(HEADS, count, DIM),
            torch.rand(HEADS, count),
            keys.expand(HEADS, -1).contiguous(),
            children.expand(HEADS, -1).contiguous() if depth == 0 else None,
        )
        for depth, (count, keys) in enumerate(zip(nodes, ends, strict=True))
    )
    layer = ClusteredLayer(
        Rows(random_numbers(HEADS, tokens, DIM), random_numbers(HEADS, tokens, DIM)),
        torch.arange(tokens).int().expand(HEADS, -1).contiguous(),
        PINNED,
        levels,
        random_numbers(HEADS, DIM, DIM),
        torch.zeros(HEADS, DIM, dtype=torch.bfloat16),
        0.1,
    )
    return ContextRecord(
        torch.zeros(tokens, dtype=torch.long),
        (layer,),
        (None,),
        {},
        IndexConfig(),
        PromptTemplate.plain(),
        {},
        "",
        {},
    )


def mapped(path: Path) -> dict[str, Tensor]:
    file = path / layer_file(0)
    with open(file, "rb") as stream:
        hashlib.file_digest(stream, "sha256").hexdigest()
    return load_file(file)


def safely(opened: ContextRecord) -> dict[str, Tensor]:
    return tensors_of(opened.layers[0])


def seconds(action: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = action()
    return time.perf_counter() - started, found


def turns(path: Path, repeats: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = defaultdict(list)
    outline, tokens = load(path).outlines[0], len(load(path).tokens)
    for repeat in range(repeats + 1):
        now = {}
        for name, way in (("mapped", partial(mapped, path)), ("safe", partial(safely, load(path)))):
            work = time.process_time()
            now[name], tensors = seconds(way)
            now[f"{name}, processor"] = time.process_time() - work
            used, _ = seconds(partial(used_once, tensors))
            now[f"{name}, used"] = now[name] + used
        now["checks alone"], _ = seconds(partial(check_layer, tensors, outline, tokens))
        if repeat:  # the first one warms up
            for name, time_s in now.items():
                found[name].append(time_s)
    return found


def used_once(tensors: dict[str, Tensor]) -> None:
    for name in ("keys", "values"):
        float(tensors[name].sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--place", type=Path, help="a directory; memory leaves the disk out")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.place) as root:
        path = save(record(given.tokens), Path(root) / "c.sqz")
        size = (path / layer_file(0)).stat().st_size
        found = turns(path, given.repeats)
    medians = {name: statistics.median(times) for name, times in found.items()}
    result = {
        "commit": commit(),
        "bytes": size,
        "threads": torch.get_num_threads(),
        "repeats": given.repeats,
        "median_ms": {name: round(1e3 * x, 1) for name, x in medians.items()},
        "fastest_ms": {name: round(1e3 * min(times), 1) for name, times in found.items()},
        "safe_to_mapped": round(medians["safe"] / medians["mapped"], 3),
        "safe_to_mapped_used": round(medians["safe, used"] / medians["mapped, used"], 3),
        "safe_to_mapped_processor": round(
            medians["safe, processor"] / medians["mapped, processor"], 3
        ),
        "checks_share": round(medians["checks alone"] / medians["safe"], 3),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if given.output:
        given.output.write_text(text + "\n")
        print(f"wrote {given.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
