"""A run says what it was: command, versions, commit, machine."""

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

import torch


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
    import triton

    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
    }
    with suppress(PackageNotFoundError):
        found["flashinfer-python"] = version("flashinfer-python")
    return found


def write_record(
    path: Path, settings: dict, rows: list[dict], at_commit: str | None = None
) -> None:
    """Write results as JSON with all that is needed to repeat them, and no directory's name."""
    record = {
        "command": " ".join(["python", "-m", *_module(), *map(_placeless, sys.argv[1:])]),
        "commit": at_commit or commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "versions": versions(),
        "settings": {name: _placeless(value) for name, value in settings.items()},
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def _placeless(value: object) -> object:
    """The last part of an absolute path, and anything else as it is."""
    is_path = isinstance(value, str) and Path(value).is_absolute()
    return Path(value).name if is_path else value


def _module() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return [spec.name] if spec else [Path(sys.argv[0]).name]


def machine() -> dict:
    """Where and with what the numbers were made."""
    import torch
    import transformers

    return {
        "command": shlex.join(["squeezed", *sys.argv[1:]]),
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
