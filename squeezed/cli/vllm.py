"""`squeezed vllm`: vLLM's server, over saved contexts; `squeezed vllm index` makes one by vLLM."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from squeezed.cli import options
from squeezed.cli.console import emit, is_directory, note, quiet_libraries
from squeezed.cli.document import read_document
from squeezed.cli.index import default_output, named
from squeezed.cli.options import DEFAULTS
from squeezed.errors import SqueezedError

PASSING_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


class ModelFirst(typer.core.TyperGroup):
    """`squeezed vllm MODEL ...` means `squeezed vllm serve MODEL ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["serve", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=ModelFirst, add_completion=False, rich_markup_mode=None)


@app.callback()
def vllm() -> None:
    """Serve a model by vLLM over saved contexts, or make a context by vLLM.

    `squeezed vllm MODEL` is short for `squeezed vllm serve MODEL`.
    """


@app.command(context_settings=PASSING_ON)
def index(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A model, as vLLM takes it.")],
    document: Annotated[Path, typer.Argument(help="A text file in UTF-8 (- reads stdin).")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory to write; DOCUMENT.sqz.")
    ] = None,
    keep_control_tokens: options.KeepControlTokens = False,
    json: options.Json = False,
) -> None:
    """Turn a document into a saved context by vLLM: right for quantised weights and many GPUs.

    All other arguments are vLLM's own, such as --tensor-parallel-size. What was read is kept until
    the context is saved, and is not read again after an interruption.
    """
    target = named(output or default_output(document))
    if is_directory(document):
        raise SqueezedError(f"document: {document} is a directory; name a text file")
    text = read_document(document)
    quiet_libraries()
    from squeezed.vllm import offline

    found = offline.index(model, text, target, context.args, keep_control_tokens, note)
    record = {"context": str(target), "tokens": found["tokens"], "seconds": found["seconds"]}
    if json:
        emit(record)
        return
    seconds = ", ".join(f"{phase} {s:.1f} s" for phase, s in record["seconds"].items())
    print(f"{target}: {record['tokens']:,} tokens ({seconds})")


@app.command(context_settings=PASSING_ON)
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A model, as vLLM takes it.")],
    contexts: Annotated[
        list[Path],
        typer.Option("--contexts", help="Directory of saved contexts; may be given again."),
    ],
    budget: options.Budget = DEFAULTS["budget"],
    preset: options.PresetName = DEFAULTS["preset"],
    context_memory: Annotated[
        float | None,
        typer.Option("--context-memory", help="GiB for contexts on every GPU; a quarter of it."),
    ] = None,
    own_tokens: Annotated[
        int,
        typer.Option("--own-tokens", help="Most tokens of a request besides its context."),
    ] = 0,
    index_pause: Annotated[
        float,
        typer.Option(
            "--index-pause",
            help="Milliseconds that indexing a document may add to a step of others; 0 for any.",
        ),
    ] = 100.0,
    print_command: Annotated[
        bool, typer.Option("--print-command", help="Print vLLM's command line, and do nothing.")
    ] = False,
) -> None:
    """Serve a model by vLLM; requests that begin with a saved context read it as asked.

    All other arguments are vLLM's own, such as --port or --tensor-parallel-size.
    """
    import torch

    from squeezed.vllm import launch
    from squeezed.vllm.settings import Settings

    settings = Settings(
        tuple(path.resolve() for path in contexts),
        budget=budget,
        preset=preset,
        context_memory=context_memory,
        own_tokens=own_tokens,
        index_pause_ms=index_pause,
    )
    on_cpu = not torch.cuda.is_available()
    words = launch.server_arguments(model, settings, context.args, on_cpu)
    environment = launch.server_environment(os.environ, on_cpu)
    if print_command:
        own = {n: v for n, v in environment.items() if os.environ.get(n) != v}
        settings_of_shell = [f"{name}={shlex.quote(value)}" for name, value in own.items()]
        print(" ".join([*settings_of_shell, shlex.join([sys.executable, *words])]))
        return
    launch.check_installed()
    launch.become(words, environment)
