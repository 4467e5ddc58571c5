"""Triton decides when a kernel is defined whether to interpret it: before any test imports one.

Tests that need a GPU carry the marker `gpu`, and this file alone decides whether they run;
`transformers(least)` marks what older supported releases of it cannot do.
"""

import interpreter  # noqa: F401
import pytest
import torch
import transformers
from packaging.version import Version


def pytest_collection_modifyitems(items):
    for item in items:
        for least in item.iter_markers("transformers"):
            if Version(transformers.__version__) < Version(*least.args):
                reason = f"needs Transformers {least.args[0]}"
                item.add_marker(pytest.mark.skip(reason=reason))
        for needed in item.iter_markers("gpu"):
            missing = what_is_missing(**needed.kwargs)
            if missing:
                item.add_marker(pytest.mark.skip(reason=missing))


def what_is_missing(generation: int = 0, memory_gb: float = 0) -> str:
    """Why a test of the marker `gpu(generation, memory_gb)` cannot run here; empty if it can."""
    if not torch.cuda.is_available():
        return "needs a GPU"
    gpu = torch.cuda.get_device_properties(0)
    if generation and gpu.major != generation:
        return f"needs a GPU of compute capability {generation}"
    if gpu.total_memory < memory_gb * 1e9:
        return f"needs a GPU with {memory_gb} GB of memory"
    return ""
