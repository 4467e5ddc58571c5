"""The suites by name."""

from __future__ import annotations

from squeezed.errors import SqueezedError
from squeezed.measure.accuracy.examples import Suite
from squeezed.measure.accuracy.suites.fidelity import FIDELITY
from squeezed.measure.accuracy.suites.longbench import LONGBENCH
from squeezed.measure.accuracy.suites.needle import NIAH
from squeezed.measure.accuracy.suites.prefixqa import PREFIXQA
from squeezed.measure.accuracy.suites.ruler import RULER

SUITES: dict[str, Suite] = {
    suite.name: suite for suite in (FIDELITY, NIAH, PREFIXQA, RULER, LONGBENCH)
}


def suite_named(name: str) -> Suite:
    """The suite of that name, or a `SqueezedError` that lists the known ones."""
    if name not in SUITES:
        raise SqueezedError(f"suite: expected one of {', '.join(SUITES)}, got {name!r}")
    return SUITES[name]
