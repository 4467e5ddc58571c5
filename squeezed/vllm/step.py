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
from squeezed.vllm.rows import ALONE, BLOCKS, WHOLE, Groups, Row, grouped, rows_of
from squeezed.vllm.worker import WORKER


@dataclass
class Call:
    """Tokens that one call of our kernels answers: `B` rows of `Q` tokens, `B x Q = N`.

    Generated tokens are rows of one. Tokens that each read all of a document are one row, whoever
    asks; those of prompts that select alone are a row for each request, filled up to the longest.

    Attributes:
        kind: how they read (`rows.Row.parts`).
        lengths: how many tokens each row has.
        places: `[N]` int64, their places in the batch, on the device; -1 where a row is filled up.
        asked: `[N]` int64, the same with some place of the batch there; `None` if the tokens are
            all of the batch in its order: nothing is gathered then.
        valid: `[B, Q]` bool, or `None` if no row is filled up.
        reads: `[B]` int64, keys that each row has read in this step so far.
    """

    context: HeldContext
    rows: list[Row]
    kind: str
    lengths: list[int]
    places: Tensor
    asked: Tensor | None
    valid: Tensor | None
    reads: Tensor

    def attend(self, number: int, query: Tensor) -> Attended:
        """Attention of a layer to the context: `[B, Hq, Q, D]`."""
        reader = self.rows[0].reader
        rule = self.context.rule(reader.budget, reader.preset, number, self.kind)
        asked = query if self.asked is None else query[self.asked]
        asked = asked.unflatten(0, (len(self.lengths), -1)).transpose(1, 2)
        return self.context.attend(asked, number, rule, valid=self.valid)

    def count(self) -> None:
        """At the end of the step: all layers have read."""
        if self.kind == WHOLE:
            return
        of_all, requests = self.context.keys_per_token, [row.request for row in self.rows]
        if max(self.lengths) == 1:
            WORKER.meter.count(requests, self.reads, of_all)
            return
        for one, request, tokens in zip(self.reads.split(1), requests, self.lengths, strict=True):
            WORKER.meter.count([request], one, tokens * of_all)


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
    found = [(ALONE, rows, [[row.start] for row in rows]) for rows in groups.decodes]
    found += parts_of(groups.prefills)
    filled = [filled_up(places) for _, _, places in found]
    flat = on_device(torch.tensor([place for places in filled for place in places]), builder.device)
    reads = flat.new_zeros(sum(len(rows) for _, rows, _ in found))
    if in_place:
        flat = builder.places[: len(flat)].copy_(flat)
        reads = builder.reads[: len(reads)].zero_()
    on_gpu = flat.split([len(places) for places in filled])
    counted = reads.split([len(rows) for _, rows, _ in found])
    return [
        call_of(kind, rows, places, where, read, own == list(range(tokens)))
        for (kind, rows, places), own, where, read in zip(
            found, filled, on_gpu, counted, strict=True
        )
    ]


def call_of(
    kind: str,
    rows: list[Row],
    places: list[list[int]],
    where: Tensor,
    reads: Tensor,
    is_all: bool,
) -> Call:
    """The call for rows of `places`, which lie at `where` on the device, filled up."""
    lengths = [len(one) for one in places]
    asked, valid = where, None
    if min(lengths) < max(lengths):
        asked, valid = where.clamp(min=0), (where >= 0).unflatten(0, (len(places), -1))
    context = context_of(rows[0])
    return Call(context, rows, kind, lengths, where, None if is_all else asked, valid, reads)


def parts_of(prefills: list[Row]) -> list[tuple[str, list[Row], list[list[int]]]]:
    """Tokens of prompts by how they read: kind, rows, and the places of each row's tokens.

    Tokens that read all of a document are one row, for nothing of them is counted. Rows that select
    alone go together if none is filled up to more than twice its length.
    """
    found: dict[tuple, tuple[str, list[Row], list[list[int]]]] = {}
    for row in prefills:
        reader = row.reader
        for kind, part in row.parts(context_of(row).single_tokens(reader.preset)):
            places = list(range(row.start + part.start, row.start + part.stop))
            if kind == WHOLE:
                key: tuple = kind, reader.key, reader.preset
                _, rows, together = found.setdefault(key, (kind, [row], [[]]))
                together[0] += places
                continue
            size = len(places) if kind == BLOCKS else 1 << (len(places) - 1).bit_length()
            _, rows, together = found.setdefault((kind, reader.rule, size), (kind, [], []))
            rows.append(row)
            together.append(places)
    return list(found.values())


def filled_up(places: list[list[int]]) -> list[int]:
    """Rows as long as the longest, one after the other; -1 behind a shorter one's tokens."""
    longest = max(map(len, places))
    return [place for one in places for place in [*one, *[-1] * (longest - len(one))]]


def context_of(row: Row) -> HeldContext:
    return WORKER.arena.held[row.reader.key]
