"""Modules of version 0.1.0 under their old names, with a warning that says where they are now."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "squeezed.calibration": "squeezed.indexing.calibrate",
    "squeezed.chat": "squeezed.answers.chat",
    "squeezed.clustering": "squeezed.indexing.clustering",
    "squeezed.fingerprint": "squeezed.hf.identity.fingerprint",
    "squeezed.inspection": "squeezed.costs.inspection",
    "squeezed.manifest": "squeezed.context.storage.manifest",
    "squeezed.memory": "squeezed.costs.memory",
    "squeezed.models": "squeezed.hf.loading",
    "squeezed.ops": "squeezed.attention",
    "squeezed.ops.cpu": "squeezed.attention.cpu",
    "squeezed.ops.reference": "squeezed.attention.reference",
    "squeezed.ops.triton": "squeezed.attention.triton",
    "squeezed.plan": "squeezed.costs.plan",
    "squeezed.prompt": "squeezed.context.prompt",
    "squeezed.rule": "squeezed.context.rule",
    "squeezed.sources": "squeezed.answers.sources",
    "squeezed.thresholds": "squeezed.context.captured",
}


class MovedModules(MetaPathFinder, Loader):
    """Finds a moved module that nothing else has found; what it is asked for, its home has."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in MOVED:
            return None
        holds_others = any(other.startswith(f"{name}.") for other in MOVED)
        return ModuleSpec(name, self, is_package=holds_others)

    def exec_module(self, module: ModuleType) -> None:
        home = MOVED[module.__name__]
        warnings.warn(
            f"{module.__name__} is {home} now; its old name goes with version 0.3",
            DeprecationWarning,
            stacklevel=2,
        )
        module.__dict__["__getattr__"] = partial(getattr, importlib.import_module(home))


def find_moved() -> None:
    """Let moved modules be imported by their old names too."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
