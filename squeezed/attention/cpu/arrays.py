"""Tensors as the arrays that Numba reads: flat, without a copy, 16-bit floats as their bits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from squeezed.attention.interface import Suffix
from squeezed.context.layers import ClusteredLayer
from squeezed.errors import SqueezedError

Array = np.ndarray
_BITS = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.uint16,
    torch.float16: torch.int16,
    torch.uint8: torch.uint8,
    torch.int8: torch.int8,
}


def flat(tensor: Tensor) -> Array:
    """All elements of a contiguous tensor; of any other, of a contiguous copy."""
    return _bits(tensor.contiguous().view(-1))


def _bits(tensor: Tensor) -> Array:
    if tensor.dtype not in _BITS:
        raise SqueezedError(
            f"keys and values: expected float32, bfloat16 or float16, got {tensor.dtype}; "
            "convert them, or use the reference implementation"
        )
    return tensor.detach().view(_BITS[tensor.dtype]).numpy()


@dataclass(frozen=True)
class SuffixRows:
    """Suffix keys and values: as given, `[B, Hkv, S, D]`, and flat, for Numba.

    `strides [2, 3]` of keys and values (batch, head, token), in elements.
    """

    key_rows: Tensor
    value_rows: Tensor
    keys: Array
    values: Array
    strides: Array

    @classmethod
    def of(cls, suffix: Suffix | None, layer: ClusteredLayer, requests: int) -> SuffixRows:
        """Views of a suffix, expanded and sliced tensors included; of no rows if there is none."""
        if suffix is None:
            keys = values = layer.centre.new_empty(requests, layer.kv_heads, 0, layer.dim)
        else:
            keys, values = _dense_rows(suffix.keys), _dense_rows(suffix.values)
        strides = np.array([keys.stride()[:3], values.stride()[:3]], np.int64)
        return cls(keys, values, _span(keys), _span(values), strides)


def _dense_rows(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _span(tensor: Tensor) -> Array:
    """Everything from the tensor's first to its last element, whatever lies between."""
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return _bits(tensor.as_strided((last + 1,), (1,)) if tensor.numel() else tensor.reshape(0))
