"""`squeezed ask`: one question, answered as it is generated."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from squeezed.cli import options
from squeezed.cli.console import emit, megabytes, note
from squeezed.cli.options import DEFAULTS
from squeezed.cli.session import open_session
from squeezed.context.text import text_of_argument
from squeezed.errors import SqueezedError

if TYPE_CHECKING:
    from transformers import TextStreamer

    from squeezed import Answer, Session
    from squeezed.hf.asking import Asking


def ask(
    source: options.Source,
    question: Annotated[str, typer.Argument(help="The question.")],
    model: options.Model = DEFAULTS["model"],
    budget: options.Budget = DEFAULTS["budget"],
    preset: options.PresetName = DEFAULTS["preset"],
    implementation: options.Implementation = DEFAULTS["implementation"],
    method: options.MethodName = DEFAULTS["method"],
    max_new_tokens: options.NewTokens = DEFAULTS["max_new_tokens"],
    show_sources: Annotated[
        bool, typer.Option("--show-sources", help="Print the passages that were attended most.")
    ] = False,
    keep_control_tokens: options.KeepControlTokens = False,
    dtype: options.Dtype = DEFAULTS["dtype"],
    device: options.Device = DEFAULTS["device"],
    json: options.Json = False,
) -> None:
    """Answer a question about a saved context or a text file."""
    from squeezed.hf.asking import Asking

    asking = Asking(budget, preset, implementation, method)
    question = check_question(question, max_new_tokens)
    opened = open_session(source, model, dtype, device, asking, None, keep_control_tokens)
    with opened as (session, context):
        answer = session.ask(
            context,
            question,
            **vars(asking),
            watch=True,
            max_new_tokens=max_new_tokens,
            streamer=None if json else printer(session),
        )
        record = report(session, asking, answer)
        if show_sources:
            record["sources"] = [asdict(passage) for passage in session.sources(answer)]
    if json:
        emit({"question": question} | record)
        return
    note(summary(record))
    for place in record.get("sources", []):
        print(source_line(place))


def check_question(question: str, max_new_tokens: int) -> str:
    """The question as text, or `SqueezedError` before anything is loaded."""
    question = text_of_argument("question", question)
    if not question.strip():
        raise SqueezedError("question: it is empty; ask something")
    if max_new_tokens < 1:
        raise SqueezedError(f"max-new-tokens: expected at least 1, got {max_new_tokens}")
    return question


def printer(session: Session) -> TextStreamer:
    """A streamer that prints each word on standard output as it comes."""
    from transformers import TextStreamer

    return TextStreamer(session.tokenizer, skip_prompt=True, skip_special_tokens=True)


def report(session: Session, asking: Asking, answer: Answer) -> dict:
    """What an answer cost."""
    read = session.traffic(answer)
    return {
        "answer": answer.text,
        "answer_tokens": len(answer.tokens),
        "method": asking.method,
        "preset": asking.preset,
        "budget_asked": answer.budget,
        "budget_spent": answer.spending.budget,
        "bytes_per_token": read.total,
        "dense_bytes_per_token": read.dense,
        "seconds": answer.seconds,
    }


def summary(record: dict) -> str:
    """The line under an answer."""
    return (
        f"[read {record['budget_spent']:.1%} of the context's keys, "
        f"{megabytes(record['bytes_per_token'])} per token against "
        f"{megabytes(record['dense_bytes_per_token'])} dense; "
        f"first token {record['seconds']['first_token']:.2f} s, then "
        f"{record['seconds']['per_token']:.3f} s each]"
    )


def source_line(place: dict) -> str:
    read = "" if place["read"] is None else f", {place['read']:.0%} read"
    return (
        f"tokens {place['start']:,}-{place['end'] - 1:,} ({place['share']:.1%} of the attention, "
        f"{place['excess']:+.1%} against a neutral question{read}): {place['text']}"
    )
