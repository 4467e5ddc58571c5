"""The command `squeezed`: results on standard output, progress and errors on standard error."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from squeezed.cli.status import INTERRUPTED_STATUS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0; 2 for what can be put right, with one line that says how; 130 when interrupted; 1 for a fault
    of this package, also in one line.

    Args:
        arguments: words of the command; `None` takes those of the process, which then ends: an
            interrupt that comes after the work is ignored.
    """
    try:
        from squeezed.cli.interrupts import Interrupts
        from squeezed.cli.run import run
        from squeezed.cli.streams import standard_streams

        words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
        with Interrupts(last=arguments is None) as interrupts, standard_streams():
            return run(words, interrupts)
    except KeyboardInterrupt:  # before there was anybody to catch it
        if sys.stderr:
            print("interrupted", file=sys.stderr)
        return INTERRUPTED_STATUS
