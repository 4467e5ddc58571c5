"""`squeezed serve`: a server over a directory of contexts, with OpenAI's routes."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from squeezed.errors import SqueezedError
from squeezed.server.settings import ServerSettings

Config = Annotated[
    Path | None, typer.Option("--config", help="TOML file of settings.", envvar="SQUEEZED_CONFIG")
]


app = typer.Typer(add_completion=False, rich_markup_mode=None)


def serve(context: typer.Context, config: Config = None, **given: Any) -> None:
    """Serve a model over saved contexts: OpenAI's routes, and documents as resources.

    Each setting can also be given as a variable (SQUEEZED_PORT) or in a TOML file (port = 8000);
    flags come first, then variables, then the file. With --engine vllm, arguments that are not
    listed here are vLLM's own, such as --tensor-parallel-size.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    settings = ServerSettings.of(chosen, config)
    if settings.engine == "vllm":
        from squeezed.server.beside.launch import serve_by_vllm

        serve_by_vllm(settings, context.args)
        return
    if context.args:
        raise SqueezedError(f"{context.args[0]}: no such option; see squeezed serve --help")
    from squeezed.cli.console import note, quiet_libraries
    from squeezed.server import run

    quiet_libraries()
    run.log_to_stderr()
    run.serve(settings, note)


def _parameters() -> list[inspect.Parameter]:
    """An option for every setting; what is not given is left to variables, file and defaults."""
    own = inspect.signature(serve).parameters
    found = [
        own["context"].replace(annotation=typer.Context),
        own["config"].replace(annotation=Config),
    ]
    for name, field in ServerSettings.model_fields.items():
        kind = field.annotation
        plain = {"Path | None": Path}.get(str(kind), kind if isinstance(kind, type) else str)
        flag = f"--{name.replace('_', '-')}"
        shown = "" if field.default in (None, "", False) else f" [default: {field.default}]"
        words = [flag, "-m"] if name == "model" else [flag]
        option = typer.Option(*words, help=f"{field.description}{shown}", show_default=False)
        found.append(
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=None,
                annotation=Annotated[plain | None, option],
            )
        )
    return found


_OPTIONS = _parameters()
serve.__signature__ = inspect.Signature(_OPTIONS)  # type: ignore[attr-defined]
serve.__annotations__ = {option.name: option.annotation for option in _OPTIONS}
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)
