"""Rows that go through the model together: one copy of their context, a suffix each.

Suffixes are padded on the left, so that the newest tokens stand side by side: a row joins by being
padded to the others' length, and leaves without moving them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache

from squeezed.hf.build import build_cache
from squeezed.hf.fixed_context import FixedContext
from squeezed.hf.suffix import SuffixLayer
from squeezed.hf.support import input_device, layer_kinds
from squeezed.server.local.rows import Row
from squeezed.server.local.seats import Seats, SharedLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Shared:
    """A model over one context, or over none: what all batches of a lane have in common."""

    def __init__(self, model: PreTrainedModel, context: FixedContext | None) -> None:
        self.model, self.context = model, context
        self.seats = None if context is None else Seats(context)
        self.tokens = 0 if context is None else len(context.tokens)

    def cache(self, row: Row) -> Cache:
        """A new cache, without tokens behind the document."""
        if self.context is None or self.seats is None:
            layers = [SuffixLayer(0) for _ in layer_kinds(self.model)]
            for layer in layers:
                layer.last = layers[-1]
            return Cache(layers=layers)
        plain = self.seats.views(row.ask.asking)
        views = [SharedLayer(place, self.seats, view) for place, view in enumerate(plain)]
        return build_cache(self.context, views, row.ask.asking.budget)


class Batch:
    """Rows of one lane.

    Attributes:
        held: of each row, tokens of its own that went through the model.
    """

    def __init__(self, shared: Shared, rows: Sequence[Row]) -> None:
        self.shared, self.rows = shared, list(rows)
        self.held = [0] * len(self.rows)
        self.cache = shared.cache(self.rows[0])

    @torch.inference_mode()
    def read(self, pieces: Sequence[Tensor], answering: bool) -> Tensor:
        """Let every row read its next ids, `[n]` each.

        Args:
            answering: a token of each row comes of it.

        Returns:
            Logits after the last one, `[B, V]` float32 on the CPU.
        """
        shared, counts = self.shared, [len(piece) for piece in pieces]
        width = max(counts)
        ids = torch.stack([pad(piece, (width - len(piece), 0)) for piece in pieces])
        if shared.seats is not None:
            shared.seats.begin(self.rows, counts, answering)
        try:
            output = self._pass(ids, width, counts)
        except BaseException:
            self._settle()
            raise
        logits = output.logits[:, -1].float().cpu()
        if shared.seats is not None:
            shared.seats.end()
        self.held = [held + count for held, count in zip(self.held, counts, strict=True)]
        return logits

    def _pass(self, ids: Tensor, width: int, counts: list[int]) -> Any:
        device = input_device(self.shared.model)
        return self.shared.model(
            input_ids=ids.to(device),
            attention_mask=self._mask(width, counts).to(device),
            position_ids=self._positions(width, counts).to(device),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )

    def _settle(self) -> None:
        """Drop what a pass that failed left in the first layers."""
        complete = self._suffix()
        for layer in self.cache.layers:
            layer.trim(complete)

    def _mask(self, width: int, counts: list[int]) -> Tensor:
        """`[B, P + S]`, 0 for the padding behind the document."""
        before, held = self.shared.tokens, self._suffix()
        mask = torch.ones(len(self.rows), before + held + width, dtype=torch.long)
        for row, (own, count) in enumerate(zip(self.held, counts, strict=True)):
            mask[row, before : before + held + width - own - count] = 0
        return mask

    def _positions(self, width: int, counts: list[int]) -> Tensor:
        """`[B, width]`; padding gets any that exists."""
        ends = torch.tensor(self.held) + torch.tensor(counts)
        own = ends[:, None] - width + torch.arange(width)
        return self.shared.tokens + own.clamp(min=0)

    def _suffix(self) -> int:
        """Columns behind the document."""
        return int(self.cache.layers[-1].suffix_length)

    @torch.inference_mode()
    def join(self, other: Batch) -> None:
        """Take in the rows of another batch of the same lane, which read something each."""
        longest = max(self._suffix(), other._suffix())
        for own, new in zip(self.cache.layers, other.cache.layers, strict=True):
            own.keys = torch.cat([_widened(x.keys, longest) for x in (own, new)])
            own.values = torch.cat([_widened(x.values, longest) for x in (own, new)])
        self.rows += other.rows
        self.held += other.held

    @torch.inference_mode()
    def keep(self, places: Sequence[int]) -> None:
        """Let only the rows at `places` stay; columns that none of them needs go too."""
        if len(places) == len(self.rows):
            return
        self.rows = [self.rows[place] for place in places]
        self.held = [self.held[place] for place in places]
        longest = max(self.held, default=0)
        for layer in self.cache.layers:
            if layer.is_initialized:
                start = max(0, layer.keys.shape[2] - longest)
                layer.keys, layer.values = (
                    x[list(places), :, start:] for x in (layer.keys, layer.values)
                )

    def alone(self, place: int) -> Batch:
        """One row as a batch of its own, with a copy of its suffix."""
        found = Batch(self.shared, [self.rows[place]])
        found.held = [self.held[place]]
        complete = self._suffix()
        for own, new in zip(self.cache.layers, found.cache.layers, strict=True):
            copy: dict[str, Any] = {}
            for name in ("keys", "values"):
                held = getattr(own, name)[place : place + 1]
                copy[name] = held[:, :, complete - self.held[place] :].clone()
            if hasattr(new, "keys_read"):
                new.lazy_initialization(copy["keys"], copy["values"])
            new.keys, new.values = copy["keys"], copy["values"]
            new.dtype, new.device, new.is_initialized = own.dtype, own.device, True
        return found


def _widened(rows: Tensor, columns: int) -> Tensor:
    """`[B, H, S, D]` with empty columns on the left."""
    return pad(rows, (0, 0, columns - rows.shape[2], 0))
