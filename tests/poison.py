"""Buffers that are handed out unwritten hold nonsense, so that reading one shows."""

from types import SimpleNamespace

import numpy as np
import torch

NONSENSE = 101
"""An index and a count that nothing here has."""


def buffers(monkeypatch, *numpy_users):
    """Poison PyTorch's new buffers, and NumPy's in the modules named."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
    own = SimpleNamespace(**vars(np))
    own.empty = _poisoned(np.empty)
    for module in numpy_users:
        monkeypatch.setattr(module, "np", own)


def _poisoned(allocate):
    def poisoned(*arguments, **settings):
        made = allocate(*arguments, **settings)
        made[...] = float("nan") if "float" in str(made.dtype) else NONSENSE
        return made

    return poisoned
