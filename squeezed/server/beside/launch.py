"""`squeezed serve --engine vllm`: the command line and the environment of vLLM's server."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from squeezed.errors import SqueezedError
from squeezed.server.beside.plugin import NAME
from squeezed.server.guard import Keys
from squeezed.server.settings import ServerSettings
from squeezed.vllm import launch
from squeezed.vllm.settings import Settings

OURS = ("--host", "--port", "--served-model-name", "--api-key", "--dtype")


def serve_by_vllm(settings: ServerSettings, given: Sequence[str]) -> None:
    """Become vLLM's server, with our routes before its own.

    Args:
        given: vLLM's own arguments, such as --tensor-parallel-size.
    """
    import torch

    launch.check_installed()
    settings.contexts.mkdir(parents=True, exist_ok=True)
    if settings.api_key_file is not None:
        Keys.of_file(settings.api_key_file)  # refused here, in one line
    on_cpu = not torch.cuda.is_available()
    words = words_of(settings, given, on_cpu)
    launch.become(words, environment_of(settings, os.environ, on_cpu))


def words_of(settings: ServerSettings, given: Sequence[str], on_cpu: bool) -> list[str]:
    """Words after `python`."""
    for word in given:
        if word.split("=")[0] in OURS:
            raise SqueezedError(f"{word}: it is a setting of squeezed serve; see its --help")
    own = ["--host", settings.host, "--port", str(settings.port)]
    own += ["--served-model-name", settings.name]
    if settings.dtype != "auto":
        own += ["--dtype", settings.dtype]
    connector = Settings(
        (settings.contexts.resolve(),),
        budget=settings.budget,
        preset=settings.preset,
        context_memory=settings.context_memory or None,
        implementation=settings.implementation,
    )
    return launch.server_arguments(settings.model, connector, [*own, *given], on_cpu)


def environment_of(
    settings: ServerSettings, environment: Mapping[str, str], on_cpu: bool
) -> dict[str, str]:
    """Variables of the server: ours among its plugins, and every setting as one."""
    found = launch.server_environment(environment, on_cpu)
    found["VLLM_PLUGINS"] = ",".join(sorted({*found["VLLM_PLUGINS"].split(","), NAME}))
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if value is None:
            continue
        if isinstance(value, Path):
            value = value.resolve()
        text = json.dumps(value) if isinstance(value, bool) else str(value)
        found[f"SQUEEZED_{name.upper()}"] = text
    return found
