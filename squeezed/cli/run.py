"""One command from its words to an exit status: every exception ends here, as one line."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from squeezed.cli.interrupts import Interrupts
from squeezed.cli.status import FAULT_STATUS, INTERRUPTED_STATUS, USAGE_STATUS
from squeezed.cli.streams import ReaderLeft
from squeezed.context.text import printable
from squeezed.errors import SqueezedError
from squeezed.system.failures import cause_of, explained

LONGEST_LINE = 800
"""Characters of an error; of a longer one the middle is left out."""


def run(words: list[str], interrupts: Interrupts) -> int:
    """Run a command; see `squeezed.cli.main`."""
    try:
        status = _command(words)
        sys.stdout.flush()
        return status
    except SystemExit:
        raise
    except (ReaderLeft, BrokenPipeError):
        return 0
    except BaseException as error:
        if interrupts.seen or isinstance(error, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
            return INTERRUPTED_STATUS
        if not isinstance(error, Exception):
            raise
        return _failed(words, error)


def _command(words: list[str]) -> int:
    # OpenMP's threads wait by spinning; beside other work that made the demo several times slower
    # than one thread. Sleeping costs little where the machine is idle.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _check_directory()
    import typer

    from squeezed.cli.app import group

    command = group()
    try:  # not main(), which takes an EOFError for Ctrl-D and a reader that left for a failure
        with command.make_context("squeezed", list(words)) as context:
            status = command.invoke(context)
    except typer.Exit as ended:
        status = ended.exit_code
    return status if isinstance(status, int) else 0


def _check_directory() -> None:
    """PyTorch's libraries end the process where the working directory was removed."""
    try:
        os.getcwd()
    except OSError as error:
        raise SqueezedError(
            "directory: the working directory was removed or cannot be read; change to another one,"
            " as in cd ~"
        ) from error


def _failed(words: list[str], error: Exception) -> int:
    if os.environ.get("SQUEEZED_TRACEBACK"):
        traceback.print_exception(error)
    usage = getattr(error, "format_message", None)
    known = explained(error)
    if usage is not None:
        from squeezed.cli.app import COMMANDS

        command = f"squeezed {words[0]}" if words[0] in COMMANDS else "squeezed"
        say_error(f"{usage().rstrip('.')}{_given(error)}; see {command} --help")
    elif known is not None:
        say_error(str(known))
    else:
        say_error(_fault(error))
        return FAULT_STATUS
    return USAGE_STATUS


def _given(error: Exception) -> str:
    """The wrong value, where Typer read it with Pydantic, whose message leaves it out."""
    problems: Callable[[], list[dict]] = getattr(error.__cause__, "errors", list)
    found = problems()
    return f", got {found[0]['input']!r}" if found else ""


def _fault(error: Exception) -> str:
    """An exception that nobody foresaw: what it is, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    package = str(Path(__file__).parents[1])
    ours = [frame for frame in frames if frame.filename.startswith(package)] or frames
    place = f" in {Path(ours[-1].filename).name}, line {ours[-1].lineno}" if ours else ""
    return (
        f"{type(error).__name__}{place}: {cause_of(error)}; this is a fault of squeezed-attention: "
        "please report it, with what SQUEEZED_TRACEBACK=1 prints"
    )


def say_error(message: str) -> None:
    line = printable(" ".join(message.split()))
    if len(line) > LONGEST_LINE:
        line = f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"
    print("error:", line, file=sys.stderr)
