"""The command `squeezed`: results on standard output, progress and errors on standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from squeezed.errors import SqueezedError

USAGE_STATUS = 2
INTERRUPTED_STATUS = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 for bad input, 130 when interrupted."""
    # OpenMP's threads wait by spinning; beside other work that made the demo several times slower
    # than one thread. Sleeping costs little where the machine is idle.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import typer

    from squeezed.cli.app import COMMANDS, group

    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        status = group().main(args=words, prog_name="squeezed", standalone_mode=False)
        sys.stdout.flush()
    except SqueezedError as error:
        return _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED_STATUS
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if usage is None:
            raise
        command = f"squeezed {words[0]}" if words[0] in COMMANDS else "squeezed"
        return _fail(f"{usage().rstrip('.')}; see {command} --help")
    if status == INTERRUPTED_STATUS:  # newer releases of Typer turn the interrupt into a status
        print("interrupted", file=sys.stderr)
    return status if isinstance(status, int) else 0


def _fail(message: str) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return USAGE_STATUS
