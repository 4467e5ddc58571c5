"""Squeezed Attention: cheap questions over long fixed documents (arXiv 2411.09688)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from squeezed.moved import find_moved
from squeezed.system.forks import survive_forks
from squeezed.system.platforms import refuse_unsupported_system

if TYPE_CHECKING:
    from squeezed.answers.session import Session
    from squeezed.attention import attend
    from squeezed.attention.interface import Attended, Suffix, merge
    from squeezed.config import ClusteringConfig, IndexConfig, Preset
    from squeezed.context.prompt import PromptTemplate
    from squeezed.engine import Answer, generate, index, load
    from squeezed.errors import ContextFileError, SqueezedError, UnsupportedModelError
    from squeezed.hf.fixed_context import FixedContext

HOMES = {
    "squeezed.answers.session": ("Session",),
    "squeezed.attention": ("attend",),
    "squeezed.attention.interface": ("Attended", "Suffix", "merge"),
    "squeezed.config": ("ClusteringConfig", "IndexConfig", "Preset"),
    "squeezed.engine": ("Answer", "generate", "index", "load"),
    "squeezed.context.prompt": ("PromptTemplate",),
    "squeezed.errors": ("ContextFileError", "SqueezedError", "UnsupportedModelError"),
    "squeezed.hf.fixed_context": ("FixedContext",),
}

__all__ = [
    "Answer",
    "Attended",
    "ClusteringConfig",
    "ContextFileError",
    "FixedContext",
    "IndexConfig",
    "Preset",
    "PromptTemplate",
    "Session",
    "SqueezedError",
    "Suffix",
    "UnsupportedModelError",
    "attend",
    "generate",
    "index",
    "load",
    "merge",
]

refuse_unsupported_system()
survive_forks()
find_moved()


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `squeezed --help` needs no PyTorch."""
    for module, names in HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
