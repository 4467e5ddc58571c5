"""vLLM's attention on CPUs, and ours for requests over a context.

A request's own tokens lie in vLLM's blocks; they are taken out of there and joined with the context
in one softmax by the implementation `cpu`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from squeezed.attention.interface import Suffix
from squeezed.errors import SqueezedError
from squeezed.vllm.blocks import ContextAttentionSpec, ContextBlocks
from squeezed.vllm.rows import WHOLE, Groups, Row, grouped, rows_of
from squeezed.vllm.settings import Settings
from squeezed.vllm.worker import WORKER


class SqueezedCPUBackend(ContextBlocks, CPUAttentionBackend):
    """In the place of vLLM's; without our connector it does what that does."""

    @staticmethod
    def get_impl_cls():
        return SqueezedCPUImpl

    @staticmethod
    def get_builder_cls():
        return SqueezedCPUBuilder


@dataclass
class SqueezedCPUMetadata(CPUAttentionMetadata):
    """vLLM's, and what it was built from: rows are told apart at the first layer, for the
    connector's news of a step come after `build`."""

    builder: SqueezedCPUBuilder | None = None
    common: object = None
    step: Step | None = None


class SqueezedCPUBuilder(CPUAttentionMetadataBuilder):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if SqueezedCPUBackend.settings is not None and self.isa != "vec":
            raise SqueezedError(
                f"dtype: vLLM stores keys for {self.isa!r} on this CPU, which contexts do not read;"
                " pass --dtype float32 and --block-size 32"
            )

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        plain = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if not isinstance(self.kv_cache_spec, ContextAttentionSpec):
            return plain  # of layers that see a window: null blocks there are what it left behind
        return SqueezedCPUMetadata(**vars(plain), builder=self, common=common_attn_metadata)


@dataclass
class Step:
    """A batch in groups.

    Attributes:
        blocks: own blocks of each row over a context.
        rest: vLLM's metadata of the rows without one, and `places`, where their tokens stand;
            `None` if all rows are alike.
    """

    groups: Groups
    blocks: dict[int, Tensor]
    rest: CPUAttentionMetadata | None
    places: Tensor | None


class SqueezedCPUImpl(CPUAttentionBackendImpl):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        SqueezedCPUBackend.settings = Settings.of_engine(get_current_vllm_config())

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs):
        meta = attn_metadata
        if not isinstance(meta, SqueezedCPUMetadata) or WORKER.arena is None:
            return super().forward(
                layer, query, key, value, kv_cache, meta, output, *args, **kwargs
            )
        step = meta.step = meta.step or step_of(meta, kv_cache.shape[2])
        if WORKER.jobs:
            see(step, layer, meta, query, kv_cache, self.scale)
        if not step.groups.has_contexts:
            return super().forward(
                layer, query, key, value, kv_cache, meta, output, *args, **kwargs
            )
        if step.rest is not None:
            places = step.places
            part = torch.empty_like(output[places])
            super().forward(
                layer, query[places], key[places], value[places], kv_cache, step.rest, part
            )
            output[places] = part
        number = extract_layer_index(layer.layer_name)
        for rows in step.groups.decodes:
            answer(rows, step, number, query, kv_cache, output)
        for row in step.groups.prefills:
            answer([row], step, number, query, kv_cache, output)
        return output


def step_of(meta: SqueezedCPUMetadata, block_size: int) -> Step:
    """The rows of a batch, told apart by the block of their last token."""
    starts, lengths = meta.query_start_loc.tolist(), meta.seq_lens.tolist()
    table = meta.block_table
    last = ((meta.seq_lens - 1).clamp(min=0) // block_size).long()
    tails = table.gather(1, last[:, None])[:, 0].tolist()
    first = table[:, 0].tolist()

    def request_of(place: int) -> str | None:
        return WORKER.tails.get(tails[place])

    rows = rows_of(starts, lengths, request_of, WORKER.readers)
    for row in rows:
        if row.reader is None and first[row.place] == 0 and row.length > row.new:
            raise RuntimeError(f"row {row.place} has null blocks and no context: a wrong answer")
    groups = grouped(rows)
    blocks = {}
    for row in rows:
        if row.reader is not None:
            held = WORKER.arena.held[row.reader.key].tokens // block_size
            used = -(-row.length // block_size)
            blocks[row.place] = table[row.place, held:used].long()
    rest, places = None, None
    if groups.plain and groups.has_contexts:
        rest, places = subset(meta, groups.plain)
    return Step(groups, blocks, rest, places)


def see(step: Step, layer, meta, query: Tensor, kv_cache: Tensor, scale: float) -> None:
    """Rows whose document is being indexed."""
    number = extract_layer_index(layer.layer_name)
    for row in step.groups.plain:
        job = WORKER.jobs.get(row.request)
        if job is None:
            continue

        def document(row=row, tokens=job.order.document_tokens) -> tuple[Tensor, Tensor]:
            blocks = meta.block_table[row.place, : -(-tokens // kv_cache.shape[2])].long()
            return tuple(x.clone() for x in suffix(kv_cache, blocks, tokens, tokens))

        job.see(row, number, query, scale, document)


def subset(meta: SqueezedCPUMetadata, rows: list[Row]) -> tuple[CPUAttentionMetadata, Tensor]:
    """vLLM's metadata of some rows, and the places of their tokens in the batch."""
    common, index = meta.common, torch.tensor([row.place for row in rows])
    places = torch.cat([torch.arange(row.start, row.stop) for row in rows])
    begin = torch.tensor([0, *(row.new for row in rows)]).cumsum(0).int()
    some = replace(
        common,
        query_start_loc=begin,
        query_start_loc_cpu=begin,
        seq_lens=common.seq_lens[index],
        num_reqs=len(rows),
        num_actual_tokens=len(places),
        max_query_len=max(row.new for row in rows),
        block_table_tensor=common.block_table_tensor[index],
        slot_mapping=common.slot_mapping[places],
    )
    return CPUAttentionMetadataBuilder.build(meta.builder, 0, some), places


def answer(
    rows: list[Row], step: Step, number: int, query: Tensor, kv_cache: Tensor, output: Tensor
) -> None:
    """Rows over one context, alike in number of tokens and parts; own tokens padded at the end."""
    reader, new = rows[0].reader, rows[0].new
    context = WORKER.arena.held[reader.key]
    attention = context.at(reader.budget, reader.preset)[number]
    own = [row.length - context.tokens for row in rows]
    longest = max(own)
    keys, values = (
        torch.stack(side)
        for side in zip(
            *(
                suffix(kv_cache, step.blocks[row.place], length, longest)
                for row, length in zip(rows, own, strict=True)
            ),
            strict=True,
        )
    )
    heads, dim = query.shape[1], keys.shape[-1]
    asked = torch.stack([query[row.start : row.stop] for row in rows]).view(-1, new, heads, dim)
    ends = torch.tensor(own)[:, None] - new + torch.arange(new) + 1
    mask = (torch.arange(longest) < ends[..., None])[:, None]
    asked = asked.transpose(1, 2).contiguous()
    for kind, part in rows[0].parts(context.single_tokens(reader.preset)):
        rule = context.rule(reader.budget, reader.preset, number, kind)
        recent = Suffix.of(attention.layer, keys, values, mask[:, :, part])
        found = context.attend(asked[:, :, part], number, rule, recent)
        answers = found.output.transpose(1, 2)
        for place, row in enumerate(rows):
            tokens = output[row.start + part.start : row.start + part.stop]
            tokens.copy_(answers[place].reshape(tokens.shape))
        if kind != WHOLE:
            of_all = (part.stop - part.start) * attention.selectable_keys
            WORKER.meter.count([row.request for row in rows], found.keys_read, of_all)


def suffix(kv_cache: Tensor, blocks: Tensor, length: int, longest: int) -> tuple[Tensor, Tensor]:
    """Keys and values `[Hkv, longest, D]` of a request's own tokens, out of vLLM's blocks.

    Keys are stored as `[D, block]` inside a block, as the kernels for plain vectors want them.
    """
    _, heads, size, both = kv_cache.shape
    dim = both // 2
    pages = kv_cache.view(len(kv_cache), heads, size * 2, dim)[blocks]
    keys, values = (side.reshape(len(blocks), heads, -1) for side in pages.chunk(2, dim=2))
    keys = keys.view(len(blocks), heads, dim, size).transpose(2, 3)
    values = values.view(len(blocks), heads, size, dim)
    flat = (x.transpose(0, 1).reshape(heads, -1, dim)[:, :length] for x in (keys, values))
    return tuple(torch.nn.functional.pad(x, (0, 0, 0, longest - length)) for x in flat)
