"""A batch with contexts: its rows told apart, and what one call of our kernels answers.

Rows are told apart once a step, when the model begins, for the connector's news come after the
metadata are built.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata

from squeezed.attention.interface import Attended
from squeezed.vllm.arena import HeldContext
from squeezed.vllm.builder import SqueezedBuilder, SqueezedMetadata, on_device
from squeezed.vllm.rows import ALONE, WHOLE, Groups, Row, grouped, rows_of
from squeezed.vllm.worker import WORKER


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
