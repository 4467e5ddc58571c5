"""vLLM's FlashAttention for a request's own tokens, our kernels for its context, joined.

`--attention-backend CUSTOM`. Rows are told apart once a step, when the model begins, for the
connector's news come after `build`. A batch without contexts is vLLM's alone, and replayed from its
graphs; one that only decodes is replayed from ours (`gpu_worker`); others are launched from Python
between vLLM's graph pieces.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from squeezed.attention.interface import Attended
from squeezed.vllm.arena import HeldContext
from squeezed.vllm.blocks import ContextAttentionSpec, ContextBlocks
from squeezed.vllm.join import join
from squeezed.vllm.plugin import GPU_WORKER
from squeezed.vllm.rows import ALONE, WHOLE, Groups, Row, grouped, rows_of
from squeezed.vllm.settings import Settings
from squeezed.vllm.worker import WORKER

LEAST_LONGEST = 512
"""Tokens that the longest request of a batch is said to have at least, besides its context."""


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


@dataclass
class Call:
    """Tokens that one call of our kernels answers.

    Attributes:
        kind: how they read (`rows.Row.parts`).
        places: `[N]` int64, their places in the batch, on the device.
        is_all: whether they are all tokens of the batch: nothing is gathered then.
        decoding: generated tokens, of several requests; otherwise tokens of one request's prompt.
        reads: `[R]` int64, keys that each request has read in this step so far.
    """

    context: HeldContext
    rows: list[Row]
    kind: str
    places: Tensor
    is_all: bool
    decoding: bool
    reads: Tensor

    def attend(self, number: int, query: Tensor) -> Attended:
        """Attention of a layer to the context: `[N, Hq, 1, D]`, or `[1, Hq, N, D]`."""
        reader = self.rows[0].reader
        rule = self.context.rule(reader.budget, reader.preset, number, self.kind)
        asked = query if self.is_all else query[self.places]
        asked = asked[:, :, None] if self.decoding else asked.transpose(0, 1)[None]
        return self.context.attend(asked, number, rule)

    def count(self) -> None:
        """At the end of the step: all layers have read."""
        if self.kind != WHOLE:
            tokens = 1 if self.decoding else len(self.places)
            of_all = tokens * self.context.keys_per_token
            WORKER.meter.count([row.request for row in self.rows], self.reads, of_all)


@dataclass
class Step:
    """A batch with contexts.

    Attributes:
        own: vLLM's metadata, in which block tables and lengths begin behind the contexts.
        alike: what batches have in common that one graph serves; `None` for those with prompts.
    """

    calls: list[Call]
    own: FlashAttentionMetadata
    alike: Hashable | None

    def count(self) -> None:
        for call in self.calls:
            call.count()


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
        """Full graphs hold batches without contexts, which only our worker tells apart."""
        if vllm_config.parallel_config.worker_cls == GPU_WORKER:
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


def resolve(meta: SqueezedMetadata) -> Step | None:
    """The rows of a batch, told apart by the requests that the runner names."""
    if meta.resolved:
        return meta.step
    meta.resolved = True
    if WORKER.arena is None or not any(request in WORKER.readers for request in WORKER.ids):
        return None
    rows, builder, common = rows_in(meta.common), meta.builder, meta.common
    held = [
        0 if row.reader is None else context_of(row).tokens // builder.block_size for row in rows
    ]
    groups = grouped(rows)
    only_decodes = not groups.prefills and all(row.new <= 1 for row in rows)
    own, alike = builder.build_own(common, held, only_decodes), None
    if only_decodes:
        own = builder.in_place(own)
        alike = (
            own.num_actual_tokens,
            own.max_seq_len,
            tuple((rows[0].reader.rule, len(rows)) for rows in groups.decodes),
        )
    calls = calls_of(groups, builder, own.num_actual_tokens, only_decodes)
    meta.step = Step(calls, own, alike)
    WORKER.ends.append(meta.step.count)
    return meta.step


def rows_in(common) -> list[Row]:
    """Every row of a batch of vLLM's."""
    ids = WORKER.ids
    starts = common.query_start_loc_cpu.tolist()
    lengths = common.seq_lens_cpu_upper_bound.tolist()[: len(starts) - 1]

    def request_of(place: int) -> str | None:
        return ids[place] if place < len(ids) else None

    return rows_of(starts, lengths, request_of, WORKER.readers)


def calls_of(groups: Groups, builder: SqueezedBuilder, tokens: int, in_place: bool) -> list[Call]:
    """What is answered by one call each; all places are copied to the device at once.

    Args:
        tokens: of the batch.
        in_place: into the builder's buffers, where graphs look for them.
    """
    found = [(rows, ALONE, [row.start for row in rows], True) for rows in groups.decodes]
    for row in groups.prefills:
        single = context_of(row).single_tokens(row.reader.preset)
        for kind, part in row.parts(single):
            places = list(range(row.start + part.start, row.start + part.stop))
            found.append(([row], kind, places, False))
    flat = torch.tensor([place for _, _, places, _ in found for place in places])
    flat = on_device(flat, builder.device)
    reads = flat.new_zeros(sum(len(rows) for rows, *_ in found))
    if in_place:
        flat = builder.places[: len(flat)].copy_(flat)
        reads = builder.reads[: len(reads)].zero_()
    parts = flat.split([len(places) for _, _, places, _ in found])
    counted = reads.split([len(rows) for rows, *_ in found])
    return [
        Call(context_of(rows[0]), rows, kind, own, places == list(range(tokens)), decoding, read)
        for (rows, kind, places, decoding), own, read in zip(found, parts, counted, strict=True)
    ]


def context_of(row: Row) -> HeldContext:
    return WORKER.arena.held[row.reader.key]


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
        """All that a layer launches: what a graph holds."""
        own = self.attend_own(layer, query, kv_cache, step.own, output)
        for call in step.calls:
            found = call.attend(number, query)
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
