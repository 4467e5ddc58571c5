"""Does the context fit on the GPU? Said before anything is allocated."""

from __future__ import annotations

import torch

from squeezed.config import BEST, ClusteringConfig
from squeezed.errors import SqueezedError
from squeezed.hf.support import text_config
from squeezed.plan import ModelShape, model_shape, plan

ACTIVATIONS = 1 << 30
"""Bytes set aside for a chunk of activations and for the clustering of one layer."""


def context_bytes(shape: ModelShape, tokens: int, clustering: ClusteringConfig) -> int:
    """Most bytes held while a document of `tokens` is indexed: one layer is there twice."""
    costs = plan(shape, tokens, 1.0, 1.0, clustering, BEST)
    held = costs.kv_bytes + costs.index_bytes
    return held + held // max(1, shape.full_layers) + ACTIVATIONS


def check_memory(model, tokens: int, clustering: ClusteringConfig) -> None:
    """Raise `SqueezedError` if the model's GPU has no room for the context; else do nothing."""
    if model.device.type != "cuda":
        return
    free, shape = free_bytes(model.device), model_shape(model.config, model.dtype.itemsize)
    needed = context_bytes(shape, tokens, clustering)
    if needed <= free:
        return
    raise SqueezedError(
        f"text: a context of {tokens:,} tokens needs {needed / 1e9:.1f} GB on {model.device}, "
        f"{free / 1e9:.1f} GB are free; about {fitting_tokens(shape, free, clustering):,} tokens "
        f"of this {text_config(model).model_type} model would fit: shorten the document or use a "
        "larger GPU"
    )


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU, with what PyTorch holds in reserve."""
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve


def fitting_tokens(shape: ModelShape, free: int, clustering: ClusteringConfig) -> int:
    """The longest document whose context takes at most `free` bytes, to a thousand tokens."""
    low, high = 0, 1 << 30
    while high - low > 1000:
        middle = (low + high) // 2
        fits = context_bytes(shape, middle, clustering) <= free
        low, high = (middle, high) if fits else (low, middle)
    return low // 1000 * 1000
