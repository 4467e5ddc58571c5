"""Every command and where it lives."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated, Any

import typer
import typer.main

from squeezed.cli.lazy import lazy_group

HELP = "Cheap questions over long fixed documents: cluster the keys once, read those that matter."

COMMANDS = {
    "index": ("squeezed.cli.index:index", "Turn a document into a fixed context and save it."),
    "convert": ("squeezed.cli.convert:convert", "Write a saved context's rows in fewer bits."),
    "append": ("squeezed.cli.append:append", "Put a text behind that of a saved context."),
    "ask": ("squeezed.cli.ask:ask", "Answer a question about a context or a document."),
    "chat": ("squeezed.cli.chat:chat", "Ask one question after another."),
    "update": ("squeezed.cli.append:update", "Give a saved context another text."),
    "crop": ("squeezed.cli.append:crop", "Keep the first tokens of a saved context."),
    "inspect": ("squeezed.cli.inspect:inspect", "Show what a context holds and reads."),
    "plan": ("squeezed.cli.plan:plan", "Work out what a context would cost, without running."),
    "demo": ("squeezed.cli.demo:demo", "Ask three questions about a real document, twice."),
    "serve": ("squeezed.cli.serve:app", "Serve a model over contexts: OpenAI's routes, jobs."),
    "vllm": ("squeezed.cli.vllm:app", "Serve a model by vLLM, over saved contexts."),
    "eval": ("squeezed.cli.eval:app", "Measure accuracy against dense attention."),
    "bench": ("squeezed.cli.bench:app", "Measure speed against dense attention."),
}


EXTRAS = {"serve": "server"}
"""Commands that need more packages than all others, and what brings them."""


def group() -> Any:
    """The command line as a click-style command."""
    return typer.main.get_command(lazy_group("squeezed", HELP, COMMANDS, root, EXTRAS))


def show_version(asked: bool) -> None:
    if asked:
        print(f"squeezed-attention {metadata.version('squeezed-attention')}")
        raise typer.Exit


def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass
