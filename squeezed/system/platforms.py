"""Systems on which this package works, and the one line for those on which it does not."""

from __future__ import annotations

import os
import sys
from pathlib import PurePath

from squeezed.errors import SqueezedError

REFUSAL = (
    "system: Windows is not supported, for a saved context is read through directory descriptors; "
    "install and run squeezed-attention in WSL (https://learn.microsoft.com/windows/wsl), or on "
    "Linux or macOS"
)
USAGE_STATUS = 2
"""As `squeezed.cli.status` has it, which cannot be imported where the package cannot."""


def refuse_unsupported_system() -> None:
    """Raise `SqueezedError` where nothing here would work; the command ends with that line alone.

    Called before anything else is imported.
    """
    if sys.platform != "win32" and hasattr(os, "O_DIRECTORY") and os.open in os.supports_dir_fd:
        return
    if _is_command():
        print("error:", REFUSAL, file=sys.stderr)
        raise SystemExit(USAGE_STATUS)
    raise SqueezedError(REFUSAL)


def _is_command() -> bool:
    """Whether this process is `squeezed`, or `python -m squeezed.cli`."""
    arguments = getattr(sys, "argv", None) or [""]  # an interpreter inside a program has none
    program = arguments[0]
    if program == "-m":  # not yet replaced by the module's file
        return any(word.startswith("squeezed.cli") for word in sys.orig_argv)
    return PurePath(program).stem.removesuffix("-script") == "squeezed"
