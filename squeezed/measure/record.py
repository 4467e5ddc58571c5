"""A run says what it was: command, commit, time, machine, versions."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("squeezed-attention", "transformers", "numba", "triton", "flashinfer-python")
"""Whose versions a record names, where they are installed, beside Python, PyTorch and CUDA."""


def about_run(device: torch.device | str, at_commit: str | None = None) -> dict:
    """All that a reader of results, or who repeats a run, must know about it.

    Args:
        device: on which it runs.
        at_commit: the source's, where there is no repository.
    """
    return {
        "command": command(),
        "commit": at_commit or commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": _device_name(torch.device(device)),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def write_record(
    path: Path,
    settings: dict,
    rows: list[dict],
    device: torch.device | str = "cuda",
    at_commit: str | None = None,
) -> None:
    """Write results as JSON with all that is needed to repeat them, and no directory's name."""
    settings = {name: _placeless(value) for name, value in settings.items()}
    record = about_run(device, at_commit) | {"settings": settings, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def command() -> str:
    """How this program was called, with the directories of absolute paths left out."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    script = Path(sys.argv[0])
    program = ["python", "-m", spec.name] if spec else [script.name]
    if not spec and script.suffix == ".py":
        program.insert(0, "python")
    return shlex.join([*program, *(str(_placeless(word)) for word in sys.argv[1:])])


def _placeless(value: Any) -> Any:
    """The last part of an absolute path, and anything else as it is."""
    is_path = isinstance(value, (str, Path)) and Path(value).is_absolute()
    return Path(value).name if is_path else str(value) if isinstance(value, Path) else value


def commit() -> str:
    """The commit of the source tree, or `unknown` outside one."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def processor() -> str:
    """The model's name as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
