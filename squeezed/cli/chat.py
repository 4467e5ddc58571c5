"""`squeezed chat`: one question after another over one context."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import count
from typing import TYPE_CHECKING, Annotated

import typer

from squeezed.cli import options
from squeezed.cli.ask import check_question, printer, report, summary
from squeezed.cli.console import json_text, note
from squeezed.cli.document import is_stdin
from squeezed.cli.options import DEFAULTS
from squeezed.cli.session import open_session
from squeezed.config import FOLD_AT
from squeezed.context.text import decoded
from squeezed.errors import SqueezedError

if TYPE_CHECKING:
    from squeezed import Session
    from squeezed.answers.chat import Chat
    from squeezed.hf.asking import Asking


def chat(
    source: options.Source,
    model: options.Model = DEFAULTS["model"],
    budget: options.Budget = DEFAULTS["budget"],
    preset: options.PresetName = DEFAULTS["preset"],
    implementation: options.Implementation = DEFAULTS["implementation"],
    method: options.MethodName = DEFAULTS["method"],
    max_new_tokens: options.NewTokens = DEFAULTS["max_new_tokens"],
    fold_at: Annotated[
        int, typer.Option("--fold-at", help="Tokens beyond which old turns are clustered; 0 never.")
    ] = FOLD_AT,
    keep_control_tokens: options.KeepControlTokens = False,
    dtype: options.Dtype = DEFAULTS["dtype"],
    device: options.Device = DEFAULTS["device"],
    json: options.Json = False,
) -> None:
    """Read questions from stdin, one a line, until it ends; the context is read once.

    With --json every answer is one JSON object on a line of its own.
    """
    from squeezed.hf.asking import Asking

    asking = Asking(budget, preset, implementation, method)
    check_question("-", max_new_tokens)
    if is_stdin(source):
        raise SqueezedError("source: stdin carries the questions; name a context or a text file")
    opened = open_session(source, model, dtype, device, asking, None, keep_control_tokens)
    with opened as (session, context):
        talk = session.chat(context, fold_at=fold_at or None, **vars(asking))
        _converse(session, talk, asking, max_new_tokens, json)


def _converse(
    session: Session, talk: Chat, asking: Asking, max_new_tokens: int, json: bool
) -> None:
    streamer = None if json else printer(session)
    for question in _questions():
        answer = talk.ask(question, max_new_tokens=max_new_tokens, streamer=streamer)
        record = {"question": question} | report(session, asking, answer)
        if json:
            print(json_text(record), flush=True)
        else:
            note(summary(record))


def _questions() -> Iterator[str]:
    """Non-empty lines of standard input; a prompt if a person types them."""
    for number in count(1):
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = getattr(sys.stdin, "buffer", sys.stdin).readline()
        if not line:
            return
        if isinstance(line, bytes):
            line = decoded("question", line, f"line {number} of stdin")
        if line.strip():
            yield line.strip()
