"""A context that does not fit is refused before anything is allocated."""

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model

from squeezed import ClusteringConfig, SqueezedError, memory
from squeezed.plan import model_shape


def model_on_gpu():
    model = tiny_model()
    return SimpleNamespace(config=model.config, dtype=torch.bfloat16, device=torch.device("cuda"))


def test_refusal_says_what_would_fit(monkeypatch):
    free = 2 << 30
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    clustering = ClusteringConfig()
    with pytest.raises(SqueezedError, match="would fit") as refusal:
        memory.check_memory(model_on_gpu(), 100_000_000, clustering)
    assert "\n" not in str(refusal.value) and "2.1 GB are free" in str(refusal.value)
    shape = model_shape(tiny_model().config, 2)
    most = memory.fitting_tokens(shape, free, clustering)
    assert memory.context_bytes(shape, most, clustering) <= free
    assert memory.context_bytes(shape, most + 3000, clustering) > free
    memory.check_memory(model_on_gpu(), most, clustering)


def test_other_devices_are_not_checked():
    memory.check_memory(tiny_model(), 10**12, ClusteringConfig())
