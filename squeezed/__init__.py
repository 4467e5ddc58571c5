"""Squeezed Attention: cheap questions over long fixed documents (arXiv 2411.09688)."""

from squeezed.config import ClusteringConfig, IndexConfig, Preset
from squeezed.context import FixedContext
from squeezed.engine import Answer, generate, index, load
from squeezed.errors import ContextFileError, SqueezedError, UnsupportedModelError

__all__ = [
    "Answer",
    "ClusteringConfig",
    "ContextFileError",
    "FixedContext",
    "IndexConfig",
    "Preset",
    "SqueezedError",
    "UnsupportedModelError",
    "generate",
    "index",
    "load",
]
