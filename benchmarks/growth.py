"""A text appended in pieces against the same text indexed at once: what does growing cost?

    python benchmarks/growth.py --out benchmarks/growth.json

For every number of pieces: how far answers and the text's own continuation are from dense, what was
spent, the bytes of the index, and the time of all appends. Trees may be joined, as by default, or
every piece stands alone.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from squeezed.answers.session import Session
from squeezed.config import GrowthConfig
from squeezed.context.growth import history_of, trees_of
from squeezed.demo.run import ANSWER_TOKENS, QUESTIONS, document
from squeezed.errors import SqueezedError
from squeezed.hf.fixed_context import FixedContext
from squeezed.measure.agreement import Agreement, compare, forced_logits
from squeezed.measure.record import write_record

LEAD_TOKENS = 16
"""Tokens of the continuation that are read as a question."""


@dataclass(frozen=True)
class Plan:
    """One way to make a context.

    Attributes:
        pieces: texts, the first indexed and the others appended.
        whole_tree, tail_share: see `GrowthConfig`.
        method: how the old keys are read.
        budget: share of them that is read.
    """

    pieces: int
    whole_tree: int
    tail_share: float
    method: str = "dense"
    budget: float = 1.0


def cut(text: str, pieces: int) -> list[str]:
    """The text in pieces of about one length, each ending with its last whole line."""
    ends = [0]
    for number in range(1, pieces):
        place = text.find("\n", round(number * len(text) / pieces)) + 1
        if place > ends[-1]:
            ends.append(place)
    ends.append(len(text))
    return [text[a:b] for a, b in pairwise(ends)]


def made(session: Session, pieces: list[str], plan: Plan) -> tuple[FixedContext, list[dict]]:
    """A context of all pieces, and after every one its tokens, trees, bytes and seconds."""
    config, steps = GrowthConfig(whole_tree=plan.whole_tree, tail_share=plan.tail_share), []
    context = session.index(pieces[0])
    for number, piece in enumerate(pieces):
        started = time.perf_counter()
        if number:
            context = context.append(
                session.model, session.tokenizer, piece, plan.budget, plan.method, config
            )
        step = {
            "tokens": len(context.tokens),
            "trees": len(trees_of(context)),
            "index_bytes": context.index_bytes(),
            "calibrated": history_of(context)[-1].calibrated,
            "seconds": time.perf_counter() - started,
        }
        steps.append(step)
    steps[0]["seconds"] = sum(context.seconds.values())
    return context, steps


def parts_of(
    session: Session, context: FixedContext, rest: str, tokens: int
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """What is forced: the demo's questions with dense answers, and how the text goes on."""
    further = context.template.further_ids(session.tokenizer, rest)[: LEAD_TOKENS + tokens]
    asked = [
        (
            context.template.question_ids(session.tokenizer, question),
            session.ask(context, question, 1.0, max_new_tokens=ANSWER_TOKENS).tokens,
        )
        for question in QUESTIONS
    ]
    return {"continuation": [(further[:LEAD_TOKENS], further[LEAD_TOKENS:])], "questions": asked}


def agreements(
    session: Session,
    context: FixedContext,
    parts: list[tuple[Tensor, Tensor]],
    budgets: list[float],
) -> list[dict]:
    """KL and the like from dense at every budget, over all tokens of `parts`."""
    dense = _logits(session, context, parts, 1.0)[0]
    found = []
    for budget in budgets:
        ours, spent = _logits(session, context, parts, budget)
        each = [
            compare(own, true, answer)
            for own, true, (_, answer) in zip(ours, dense, parts, strict=True)
        ]
        found.append({"budget": budget, "spent": spent, **_mean(each)})
    return found


def _logits(
    session: Session, context: FixedContext, parts: list[tuple[Tensor, Tensor]], budget: float
) -> tuple[list[Tensor], float]:
    logits, spent = [], 0.0
    for part in parts:
        cache = context.cache(budget)
        logits += forced_logits(session.model, cache, [part])
        spent += cache.spending().budget / len(parts)
    return logits, spent


def _mean(each: list[Agreement]) -> dict:
    tokens = sum(found.tokens for found in each)
    names = ("kl", "top1", "nll")
    return {
        name: sum(getattr(found, name) * found.tokens for found in each) / tokens for name in names
    } | {"tokens": tokens}


app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Result file; rows of an older one stay.")],
    model: Annotated[str, typer.Option(help="Directory, .gguf file, hub name, or demo.")] = "demo",
    text: Annotated[Path | None, typer.Option(help="Text file; the demo's by default.")] = None,
    pieces: Annotated[list[int], typer.Option(help="Numbers of pieces.")] = [1, 4, 16, 64],  # noqa: B006
    whole_tree: Annotated[
        int, typer.Option(help="Tokens from which on a tree is left alone; 0 joins none.")
    ] = GrowthConfig().whole_tree,
    tail_share: Annotated[
        float, typer.Option(help="Most that may stand behind a tree; 1 joins small ones only.")
    ] = GrowthConfig().tail_share,
    method: Annotated[str, typer.Option(help="How new text reads the old keys.")] = "dense",
    read_budget: Annotated[float, typer.Option(help="Share of them that it reads.")] = 1.0,
    budgets: Annotated[list[float], typer.Option(help="Shares of the keys read.")] = [0.05, 0.1],  # noqa: B006
    share: Annotated[float, typer.Option(help="Part of the text that is the document.")] = 0.88,
    tokens: Annotated[int, typer.Option(help="Tokens of the continuation.")] = 750,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """A text appended in pieces against indexed at once."""
    whole = document() if text is None else text.read_text(encoding="utf-8")
    end = whole.find("\n", round(share * len(whole))) + 1
    if not end:
        raise SqueezedError(f"share: nothing is left behind {share} of the text; take less")
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.exists() else []
    with Session.of(model, dtype, device, lambda line: typer.echo(line, err=True)) as session:
        for count in pieces:
            plan = Plan(count, whole_tree, tail_share, method, read_budget)
            context, steps = made(session, cut(whole[:end], count), plan)
            parts = parts_of(session, context, whole[end:], tokens)
            row = asdict(plan) | {
                "pieces_made": len(steps),  # fewer where lines are longer than pieces
                "tokens": len(context.tokens),
                "index_bytes": context.index_bytes(),
                "seconds": sum(step["seconds"] for step in steps),
                "read": sum(change.read for change in history_of(context)),
                "threads": torch.get_num_threads(),
                **{name: agreements(session, context, own, budgets) for name, own in parts.items()},
                "steps": steps,
            }
            rows.append(row)
            typer.echo(json.dumps({name: row[name] for name in row if name != "steps"}), err=True)
            settings = {"model": model, "share": share, "dtype": str(session.model.dtype)}
            write_record(out, settings, rows, session.model.device)


if __name__ == "__main__":
    app()
