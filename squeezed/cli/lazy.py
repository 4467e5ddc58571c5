"""A command group whose commands are imported when they are asked for: help stays fast."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import typer
import typer.core
import typer.main

from squeezed.errors import SqueezedError


class LazyGroup(typer.core.TyperGroup):
    """Commands by name as `"module:attribute"`: a function, or a Typer application.

    `summaries` holds what help says of each, so that listing them imports nothing.
    """

    commands_at: dict[str, str] = {}  # noqa: RUF012  (set once by `lazy_group`)
    summaries: dict[str, str] = {}  # noqa: RUF012
    extras: dict[str, str] = {}  # noqa: RUF012

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for name, place in self.commands_at.items() if _exists(place)]

    def get_command(self, ctx: Any, name: str) -> Any:
        place = self.commands_at.get(name)
        if place is None or not _exists(place):
            return None
        module, attribute = place.split(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            if name not in self.extras or str(error.name).startswith("squeezed"):
                raise
            raise SqueezedError(
                f"{name}: it needs the package {error.name}; pip install "
                f"'squeezed-attention[{self.extras[name]}]'"
            ) from error
        if not isinstance(found, typer.Typer):
            app = typer.Typer(add_completion=False, rich_markup_mode=None)
            app.command(name)(found)
            found = app
        command = typer.main.get_command(found)
        command.name = name
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        rows = [(name, self.summaries.get(name, "")) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def no_options() -> None:
    pass


def lazy_group(
    name: str,
    help: str,
    commands: dict[str, tuple[str, str]],
    root: Callable[..., None] = no_options,
    extras: dict[str, str] | None = None,
) -> typer.Typer:
    """A Typer application over `{command: ("module:attribute", summary)}`.

    Args:
        root: its parameters are the options that stand before the command's name.
        extras: of the package, which bring what a command imports.
    """
    group = type(
        f"{name.title()}Group",
        (LazyGroup,),
        {
            "commands_at": {key: place for key, (place, _) in commands.items()},
            "summaries": {key: summary for key, (_, summary) in commands.items()},
            "extras": extras or {},
        },
    )
    app = typer.Typer(cls=group, name=name, help=help, add_completion=False, rich_markup_mode=None)
    app.callback(help=help)(root)
    return app


def _exists(place: str) -> bool:
    module = place.split(":")[0]
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
