"""vLLM's metadata of a step, once more for what follows the contexts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from squeezed.vllm.blocks import ContextAttentionSpec
from squeezed.vllm.plugin import GPU_WORKER

if TYPE_CHECKING:
    from squeezed.vllm.step import Step

LEAST_LONGEST = 512
"""Tokens that the longest request of a batch is said to have at least, besides its context."""


@dataclass
class SqueezedMetadata(FlashAttentionMetadata):
    """vLLM's, and what it was built from."""

    builder: SqueezedBuilder | None = None
    common: Any = None
    resolved: bool = False
    step: Step | None = None


class SqueezedBuilder(FlashAttentionMetadataBuilder):
    """Also holds what graphs read at fixed addresses: planned once, for the largest batch."""

    supports_update_block_table = False

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec) -> AttentionCGSupport:
        """Full graphs hold batches without contexts, which only our worker tells apart, and only in
        vLLM's second model runner."""
        ours = vllm_config.parallel_config.worker_cls == GPU_WORKER
        if ours and vllm_config.use_v2_model_runner:
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        most = vllm_config.scheduler_config.max_num_seqs
        self.places = torch.zeros(most, dtype=torch.int64, device=device)
        self.reads = torch.zeros(most, dtype=torch.int64, device=device)
        self.fixed: dict[tuple, Tensor] = {}

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        plain = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if not isinstance(self.kv_cache_spec, ContextAttentionSpec):
            return plain  # of layers that see a window: null blocks there are what it left behind
        return SqueezedMetadata(**vars(plain), builder=self, common=common_attn_metadata)

    def build_own(self, common, held: list[int], planned: bool) -> FlashAttentionMetadata:
        """Of rows whose first `held` blocks are their context's.

        Args:
            planned: FlashAttention 3 shares out its work once a step, not once a layer.
        """
        bound = common.seq_lens_cpu_upper_bound[: len(held)]
        skipped = torch.tensor(held, dtype=bound.dtype) * self.block_size
        longest = self.rounded(int((bound - skipped).max()))
        blocks = on_device(torch.tensor(held, dtype=torch.int32), self.device)
        table = shifted(common.block_table_tensor, blocks, longest // self.block_size)
        own = common.replace(
            seq_lens=common.seq_lens - blocks * self.block_size,
            seq_lens_cpu_upper_bound=bound - skipped,
            block_table_tensor=table,
            max_seq_len=longest,
        )
        return FlashAttentionMetadataBuilder.build(self, 0, own, fast_build=not planned)

    def rounded(self, tokens: int) -> int:
        """Up to a power of two of blocks, and many: batches that grow stay alike."""
        blocks = -(-max(tokens, LEAST_LONGEST) // self.block_size)
        return (1 << (blocks - 1).bit_length()) * self.block_size

    def in_place(self, own: FlashAttentionMetadata) -> FlashAttentionMetadata:
        """The same at addresses that do not change while shapes do not."""
        names = ("query_start_loc", "seq_lens", "block_table", "scheduler_metadata")
        found = {name: getattr(own, name) for name in names}
        return replace(own, **{n: self._fixed(n, x) for n, x in found.items() if x is not None})

    def _fixed(self, name: str, found: Tensor) -> Tensor:
        key = name, tuple(found.shape), found.dtype
        if key not in self.fixed:
            self.fixed[key] = torch.empty_like(found, memory_format=torch.contiguous_format)
        return self.fixed[key].copy_(found)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copied without a wait."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def shifted(table: Tensor, held: Tensor, width: int) -> Tensor:
    """Block tables `[R, W]` without the first `held [R]` blocks of each row, `width` wide."""
    columns = torch.arange(width, device=table.device)
    places = (held[:, None] + columns).clamp(max=table.shape[1] - 1)
    return table.gather(1, places.long())
