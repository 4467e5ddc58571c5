"""Milliseconds per token of Transformers' own `generate()`: squeezed, and dense at its best.

The model has the shape of Llama-3.1-8B and random weights. Its context is made of the keys, values
and queries that these weights give for a short random text, repeated with noise to the wanted
length: prefilling half a million tokens would take minutes and change no time measured here.
"""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from squeezed.config import DEFAULT_BUDGET
from squeezed.context.captured import CapturedLayer
from squeezed.hf.cache import suffix_mask
from squeezed.hf.capture import capture
from squeezed.hf.clock import Clock
from squeezed.hf.switch import using_attention
from squeezed.measure.record import write_record
from squeezed.measure.speed import common
from squeezed.measure.speed.fabricated import context_of, dense_cache, random_model

SEED_TOKENS = 4096
QUESTION_TOKENS = 32
PACKED = "packed_dense"


@dataclass(frozen=True)
class Run:
    """One measured way to generate."""

    method: str
    context_tokens: int
    ms_per_token: float
    ms_spread: tuple[float, float]  # 10th and 90th percentile
    first_call_s: float  # question, compilation and all tokens of the first call
    budget_spent: float


def packed_dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Dense attention that reads each key once for all query heads of its group.

    A decoding step leaves the mask out: with one, PyTorch has no kernel that splits the context
    over the whole GPU. It then attends to the buffer's empty slots too, which makes its answers
    wrong and its time the best that dense attention can reach here.
    """
    batch, heads, rows, dim = query.shape
    if rows > 1:
        group = heads // key.shape[1]
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        output = scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling)
        return output.transpose(1, 2), None
    packed = query.reshape(batch, key.shape[1], -1, dim)
    output = scaled_dot_product_attention(packed, key, value, scale=scaling)
    return output.reshape(batch, heads, 1, dim).transpose(1, 2), None


AttentionInterface.register(PACKED, packed_dense)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def measure(
    model: PreTrainedModel, method: str, attention: str, cache: Cache, tokens: int, new_tokens: int
) -> Run:
    """Generate once; the first steps compile and warm up, the rest are timed."""
    question = torch.randint(0, model.config.vocab_size, (1, QUESTION_TOKENS), device=model.device)
    watch = Clock(waits=True)
    with using_attention(model, attention):
        model.generate(
            input_ids=question,
            attention_mask=suffix_mask(tokens, torch.ones_like(question)),
            past_key_values=cache,
            max_new_tokens=new_tokens,
            do_sample=False,
            stopping_criteria=[watch],
        )
    steps = watch.steps_ms(skip=new_tokens // 2)
    deciles = statistics.quantiles(steps, n=10)
    spent = cache.spending().budget if hasattr(cache, "spending") else 1.0
    return Run(
        method,
        tokens,
        statistics.median(steps),
        (deciles[0], deciles[-1]),
        time.perf_counter() - watch.times[0],
        spent,
    )


METHODS = ("squeezed", "dense, no mask", "dense")


def run(
    contexts: list[int],
    methods: list[str],
    layers: int,
    budget: float,
    new_tokens: int,
    device: str,
    small: bool,
) -> list[Run]:
    """Measure every context length: squeezed, dense packed by group, Transformers' own dense."""
    model = random_model(layers, device, small)
    ids = torch.randint(0, model.config.vocab_size, (SEED_TOKENS if not small else 512,))
    seeds = capture(model, ids, ids[:100], chunk=2048)
    suffix = QUESTION_TOKENS + new_tokens
    results = []
    for tokens in contexts:
        for method in methods:
            try:
                results.append(_one(model, seeds, method, tokens, suffix, budget, new_tokens))
                typer.echo(f"{results[-1]}", err=True)
            except torch.OutOfMemoryError as error:
                typer.echo(f"{method} at {tokens}: {str(error).splitlines()[0]}", err=True)
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    return results


def _one(
    model: PreTrainedModel,
    seeds: list[CapturedLayer],
    method: str,
    tokens: int,
    suffix: int,
    budget: float,
    new: int,
) -> Run:
    torch.compiler.reset()
    with torch.inference_mode(False), torch.no_grad():
        if method == "squeezed":
            context = context_of(model, seeds, tokens, budget)
            cache, attention = context.cache(budget, suffix_tokens=suffix), "squeezed"
        else:
            cache = dense_cache(model, seeds, tokens, suffix)
            attention = PACKED if method == "dense, no mask" else "sdpa"
        return measure(model, method, attention, cache, tokens, new)


app = typer.Typer(add_completion=False)


@app.command()
def main(
    context: Annotated[list[int], typer.Option(help="Context lengths in tokens.")] = [131072],  # noqa: B006
    method: Annotated[list[str], typer.Option(help="Ways to generate.")] = list(METHODS),  # noqa: B006
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 32,
    budget: Annotated[float, typer.Option(help="Share of the keys read.")] = DEFAULT_BUDGET,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("benchmarks/generate.json"),
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the benchmark.")] = "cuda",
    small: Annotated[bool, typer.Option(help="A tiny model, to try the benchmark.")] = False,
) -> None:
    """Time per generated token inside Transformers' generate()."""
    if device == "cuda":
        common.require_gpu()
    results = run(context, method, layers, budget, new_tokens, device, small)
    rows = [asdict(result) for result in results]
    if device == "cuda":
        write_record(out, {"layers": layers, "budget": budget}, rows)
    table = []
    for result in results:
        same = [r for r in results if r.context_tokens == result.context_tokens]
        best = min((r.ms_per_token for r in same if r.method != "squeezed"), default=float("nan"))
        table.append(
            [
                result.context_tokens,
                result.method,
                f"{result.ms_per_token:.2f}",
                f"{best / result.ms_per_token:.2f}x",
                f"{result.budget_spent:.3f}",
                f"{result.first_call_s:.0f}",
            ]
        )
    common.print_table(["context", "method", "ms/token", "speed-up", "budget", "first s"], table)


if __name__ == "__main__":
    app()
