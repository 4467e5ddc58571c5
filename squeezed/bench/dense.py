"""Dense attention at its best: what a decode step over a squeezed context has to beat."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from squeezed.bench.common import Timing, time_in_graph
from squeezed.tree import ClusteredLayer


def dense_peers(query: Tensor, layers: list[ClusteredLayer]) -> dict[str, list[Callable]]:
    """Dense attention over the whole context, with the queries of all requests as rows.

    Each library gets both forms: the heads of a group as rows too ("packed"), or as heads.
    """
    kv_heads, _, dim = layers[0].keys.shape
    batch, heads = query.shape[:2]
    by_head = query.transpose(0, 2).contiguous()  # [1, Hq, B, D]
    packed = by_head.reshape(1, kv_heads, heads // kv_heads * batch, dim)

    def sdpa(rows: Tensor, layer: ClusteredLayer, backend: SDPBackend) -> Callable:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(
                    rows, layer.keys[None], layer.values[None],
                    enable_gqa=rows.shape[1] != kv_heads,
                )  # fmt: skip

        return call

    flash, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    peers = {}
    for library, backend in (("torch flash", flash), ("cuDNN", cudnn)):
        peers[f"{library}, packed"] = [sdpa(packed, layer, backend) for layer in layers]
        if heads != kv_heads:
            peers[library] = [sdpa(by_head, layer, backend) for layer in layers]
    try:
        from flashinfer import single_prefill_with_kv_cache
    except ImportError:
        return peers
    tokens = query[:, :, 0].contiguous()  # [B, Hq, D]

    def flashinfer(layer: ClusteredLayer) -> Callable:
        # What "auto" takes on Hopper ("fa3") divides by zero in 0.6.13 and ends the process.
        return lambda: single_prefill_with_kv_cache(
            tokens, layer.keys, layer.values, causal=False, kv_layout="HND", backend="fa2"
        )

    return peers | {"FlashInfer": [flashinfer(layer) for layer in layers]}


def time_or_reason(calls: list[Callable], replays: int) -> Timing | str:
    """A peer that refuses the shape is reported, not fatal."""
    try:
        return time_in_graph(calls, replays)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        torch.cuda.synchronize()
        return str(error).strip().splitlines()[0][:80]
