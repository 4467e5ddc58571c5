"""Dense attention at its best: what a decode step or prefill over a squeezed context must beat."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from squeezed.context.layers import ClusteredLayer
from squeezed.measure.speed.common import Timing, time_in_graph

LIBRARIES = {"torch flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


def dense_peers(query: Tensor, layers: list[ClusteredLayer]) -> dict[str, list[Callable]]:
    """Dense attention over the whole context, with the queries of all requests as rows.

    Each library gets both forms: the heads of a group as rows too ("packed"), or as heads.
    """
    kv_heads, _, dim = layers[0].keys.shape
    batch, heads = query.shape[:2]
    by_head = query.transpose(0, 2).contiguous()  # [1, Hq, B, D]
    packed = by_head.reshape(1, kv_heads, heads // kv_heads * batch, dim)

    def over_layers(rows: Tensor, backend: SDPBackend) -> list[Callable]:
        return [partial(_sdpa, rows, x.keys[None], x.values[None], backend) for x in layers]

    peers: dict[str, list[Callable]] = {}
    for library, backend in LIBRARIES.items():
        peers[f"{library}, packed"] = over_layers(packed, backend)
        if heads != kv_heads:
            peers[library] = over_layers(by_head, backend)
    tokens = query[:, :, 0].contiguous()  # [B, Hq, D]
    flashinfer = [_flashinfer(tokens, layer.keys, layer.values, False) for layer in layers]
    there = [call for call in flashinfer if call is not None]
    return peers | ({"FlashInfer": there} if there else {})


def prefill_peers(query: Tensor, keys: Tensor, values: Tensor) -> dict[str, Callable]:
    """Dense attention of `query [1, Hq, Q, D]` to `keys, values [1, Hkv, P + Q, D]`, causal.

    cuDNN has no causal mask for fewer queries than keys, and the packed forms can have none; they
    go without, and compute under 1 % more.
    """
    causal = causal_lower_right(query.shape[2], keys.shape[2])
    peers: dict[str, Callable] = {
        "torch flash": partial(_sdpa, query, keys, values, LIBRARIES["torch flash"], causal),
        "cuDNN": partial(_sdpa, query, keys, values, LIBRARIES["cuDNN"]),
    }
    if query.shape[1] != keys.shape[1]:
        packed = query.reshape(1, keys.shape[1], -1, query.shape[3])
        for library, backend in LIBRARIES.items():
            peers[f"{library}, packed"] = partial(_sdpa, packed, keys, values, backend)
    tokens = query[0].transpose(0, 1).contiguous()  # [Q, Hq, D]
    flashinfer = _flashinfer(tokens, keys[0], values[0], True)
    return peers | ({"FlashInfer": flashinfer} if flashinfer else {})


def _sdpa(
    rows: Tensor, keys: Tensor, values: Tensor, backend: SDPBackend, mask: CausalBias | None = None
) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(
            rows, keys, values, attn_mask=mask, enable_gqa=rows.shape[1] != keys.shape[1]
        )


def _flashinfer(tokens: Tensor, keys: Tensor, values: Tensor, causal: bool) -> Callable | None:
    """FlashInfer's attention of `[Q, Hq, D]` to `[Hkv, P, D]`; `None` where it is not installed."""
    try:
        from flashinfer import single_prefill_with_kv_cache
    except ImportError:
        return None
    # What "auto" takes on Hopper ("fa3") divides by zero in 0.6.13 and ends the process.
    return lambda: single_prefill_with_kv_cache(
        tokens, keys, values, causal=causal, kv_layout="HND", backend="fa2"
    )


def time_or_reason(calls: list[Callable], replays: int) -> Timing | str:
    """A peer that refuses the shape is reported, not fatal."""
    try:
        return time_in_graph(calls, replays)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        torch.cuda.synchronize()
        return str(error).strip().splitlines()[0][:80]
