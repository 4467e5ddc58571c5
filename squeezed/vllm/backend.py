"""vLLM's FlashAttention for a request's own tokens, our kernels for its context, joined.

`--attention-backend CUSTOM`. A batch without contexts is vLLM's alone, and replayed from its
graphs; one that only decodes is replayed from ours (`gpu_worker`); others are launched from Python
between vLLM's graph pieces.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
)

from squeezed.vllm.blocks import ContextBlocks
from squeezed.vllm.builder import SqueezedBuilder, SqueezedMetadata
from squeezed.vllm.join import join
from squeezed.vllm.rows import WHOLE
from squeezed.vllm.settings import Settings
from squeezed.vllm.step import Step, resolve, rows_in
from squeezed.vllm.worker import WORKER


class SqueezedBackend(ContextBlocks, FlashAttentionBackend):
    """FlashAttention, and contexts."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls():
        return SqueezedImpl

    @staticmethod
    def get_builder_cls():
        return SqueezedBuilder


class SqueezedImpl(FlashAttentionImpl):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        SqueezedBackend.settings = Settings.of_engine(get_current_vllm_config())

    def process_weights_after_loading(self, act_dtype) -> None:
        """Before vLLM measures how much memory is left for its blocks."""
        super().process_weights_after_loading(act_dtype)
        settings = SqueezedBackend.settings
        if settings is not None and torch.cuda.is_available():
            total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            WORKER.reserve(settings.memory_bytes(total))

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs):
        meta = attn_metadata
        step = resolve(meta) if isinstance(meta, SqueezedMetadata) else None
        if WORKER.jobs and isinstance(meta, SqueezedMetadata):
            self.see(meta, layer, query, kv_cache)
        if step is None:
            return super().forward(
                layer, query, key, value, kv_cache, meta, output, *args, **kwargs
            )
        tokens = step.own.num_actual_tokens
        asked, answer = query[:tokens], output[:tokens]
        number = extract_layer_index(layer.layer_name)
        self.attend(step, layer, number, asked, kv_cache, answer)
        return output

    def see(self, meta: SqueezedMetadata, layer, query: Tensor, kv_cache: Tensor) -> None:
        """Rows whose document is being indexed."""
        number = extract_layer_index(layer.layer_name)
        for row in rows_in(meta.common):
            job = WORKER.jobs.get(row.request)
            if job is None:
                continue

            def document(row=row, tokens=job.order.document_tokens) -> tuple[Tensor, Tensor]:
                blocks = meta.block_table[row.place, : -(-tokens // kv_cache.shape[2])].long()
                pages = kv_cache[blocks].transpose(0, 1).flatten(1, 2)[:, :tokens]
                return tuple(x.contiguous() for x in pages.split(self.head_size, -1))

            job.see(row, number, query, self.scale, document)

    def attend(
        self, step: Step, layer, number: int, query: Tensor, kv_cache: Tensor, output: Tensor
    ) -> None:
        """All that a layer launches: what a graph holds. Neither kernel fills a GPU while requests
        decode, so vLLM's runs beside ours."""
        with WORKER.beside(step.alike is not None) as own_is_there:
            own = self.attend_own(layer, query, kv_cache, step.own, output)
        for call in step.calls:
            found = call.attend(number, query)
            own_is_there()
            reads = None if call.kind == WHOLE else call.reads
            join(found, call.context.layers[number], query, output, own, call.places, reads)

    def attend_own(
        self, layer, query: Tensor, kv_cache: Tensor, meta: FlashAttentionMetadata, output: Tensor
    ) -> Tensor:
        """vLLM's kernel over its own blocks, into `output`; its log-sum-exp `[Hq, T]`."""
        both = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        keys, values = map(canonicalize_singleton_dim_strides, both)
        scales = (len(meta.seq_lens), self.num_kv_heads)
        _, own = fa_utils.flash_attn_varlen_func(
            q=query,
            k=keys,
            v=values,
            out=output,
            cu_seqlens_q=meta.query_start_loc,
            max_seqlen_q=meta.max_query_len,
            seqused_k=meta.seq_lens,
            max_seqlen_k=meta.max_seq_len,
            softmax_scale=self.scale,
            causal=True,
            window_size=[-1, -1],
            block_table=meta.block_table,
            scheduler_metadata=meta.scheduler_metadata,
            fa_version=self.vllm_flash_attn_version,
            k_descale=layer._k_scale.expand(scales),
            v_descale=layer._v_scale.expand(scales),
            num_splits=meta.max_num_splits,
            return_softmax_lse=True,
        )
        return own
