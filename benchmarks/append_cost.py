"""What an append costs beside indexing the whole text: a model with random weights, random tokens.

    python benchmarks/append_cost.py --out benchmarks/h200/append_cost.json

The model has the shape of Llama-3.1-8B. Indexing is timed in its parts; the append with the old
thresholds, as it is below a tenth of new tokens, and with thresholds fitted anew.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from squeezed.config import BEST, GrowthConfig, IndexConfig
from squeezed.context.captured import handed_over
from squeezed.context.prompt import PromptTemplate
from squeezed.hf.asking import Asking
from squeezed.hf.capture import capture
from squeezed.hf.fixed_context import FixedContext
from squeezed.hf.growing import Growing, silent
from squeezed.indexing.build import cluster
from squeezed.indexing.calibrate import calibrate
from squeezed.measure.record import write_record
from squeezed.measure.speed.fabricated import random_model

PROBE_TOKENS = 160


@dataclass(frozen=True)
class Unworded(Growing):
    """Grows by ids alone: the calibrating question has no words either."""

    question: Tensor | None = None

    def _probe(self, context: FixedContext, tokens: Tensor) -> Tensor:
        return self.question


def indexed(model, ids: Tensor, probe: Tensor, chunk: int) -> tuple[FixedContext, dict[str, float]]:
    """A context of ids, and the seconds of every part."""
    config, marks = IndexConfig(presets=(BEST,), prefill_chunk=chunk), [now(model)]
    captured = capture(model, ids, probe, chunk)
    marks.append(now(model))
    layers, forest = cluster(handed_over(captured), len(ids), config.clustering)
    marks.append(now(model))
    found = calibrate(forest, BEST, config.budgets, config.calibration)
    marks.append(now(model))
    context = FixedContext(
        tokens=ids,
        layers=tuple(layers),
        windows=(None,) * len(layers),
        calibrations={BEST.name: found},
        config=config,
        template=PromptTemplate.plain(),
        model={},
        tokenizer="",
        seconds={},
        observed=tuple(seen.queries for seen in forest.layers()),
    )
    names = ("prefill_s", "cluster_s", "calibrate_s")
    parts = zip(names, marks, marks[1:], strict=False)
    return context, {name: end - start for name, start, end in parts}


def now(model) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def appended(model, context: FixedContext, ids: Tensor, probe: Tensor, share: float, turns: int):
    """Seconds of every append, the first one, which compiles, left out."""
    config = GrowthConfig(calibrate_share=share)
    growing = Unworded(model, None, Asking(1.0), config, silent, probe)
    seconds = []
    for _ in range(turns + 1):
        started = now(model)
        grown = growing.grown(context, ids, (len(context.tokens), len(ids)))
        seconds.append(now(model) - started)
    assert grown.history[-1].calibrated == (share == 0)
    return seconds[1:]


app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Result file.")],
    tokens: Annotated[list[int], typer.Option(help="Of the context.")] = [32768, 131072],  # noqa: B006
    new: Annotated[int, typer.Option(help="Tokens to append.")] = 1024,
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 32,
    turns: Annotated[int, typer.Option(help="Appends that are timed.")] = 5,
    chunk: Annotated[int, typer.Option(help="Tokens per forward pass.")] = 1024,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the benchmark.")] = "cuda",
    small: Annotated[bool, typer.Option(help="A tiny model, to try the benchmark.")] = False,
) -> None:
    """Seconds of an append beside those of indexing."""
    model, rows = random_model(layers, device, small), []
    probe = torch.randint(0, model.config.vocab_size, (PROBE_TOKENS,))
    for count in tokens:
        ids = torch.randint(0, model.config.vocab_size, (count + new,))
        indexed(model, ids[:2048], probe, chunk)  # compiles
        context, parts = indexed(model, ids[:count], probe, chunk)
        whole = sum(parts.values())
        row: dict = {"tokens": count, "new": new, **parts, "index_s": whole}
        for name, share in (("append_s", 1.0), ("append_calibrated_s", 0.0)):
            seconds = appended(model, context, ids[count:], probe, share, turns)
            row[name] = {"median": statistics.median(seconds), "all": seconds}
            row[f"{name.removesuffix('_s')}_share"] = statistics.median(seconds) / whole
        rows.append(row)
        typer.echo(f"{row}", err=True)
        write_record(out, {"layers": layers, "chunk": chunk, "small": small}, rows, device)


if __name__ == "__main__":
    app()
