"""`squeezed vllm`: vLLM's server, over saved contexts."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from squeezed.cli import options
from squeezed.cli.options import DEFAULTS

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def vllm(
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
