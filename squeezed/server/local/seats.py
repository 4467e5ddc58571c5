"""A context's layers as several rows read them in one pass, each with its own budget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from squeezed.attention.interface import Attended, Suffix
from squeezed.context.record import ContextRecord
from squeezed.hf.asking import Asking
from squeezed.methods.base import ContextAttention
from squeezed.server.local.rows import Row

MOST_ASKINGS = 64
"""Settings whose thresholds are kept at hand."""


class Seats:
    """Who sits where in the pass that is under way, and what they read.

    Attributes:
        rows: of the batch, in order.
        tokens: of each in this pass, padding left out.
        answering: the pass makes a token of each row.
    """

    def __init__(self, record: ContextRecord) -> None:
        self.record = record
        self.rows: Sequence[Row] = ()
        self.tokens: Sequence[int] = ()
        self.answering = False
        self._views: OrderedDict[Asking, Sequence[ContextAttention]] = OrderedDict()
        self._read: Tensor | None = None
        self._available = 0
        self._queries: list[tuple[Row, int, Tensor]] = []

    def begin(self, rows: Sequence[Row], tokens: Sequence[int], answering: bool) -> None:
        """Seat the rows of a pass."""
        self.rows, self.tokens, self.answering = rows, tokens, answering
        self._read, self._available, self._queries = None, 0, []

    def end(self) -> None:
        """Note for every row what it read; the pass is complete."""
        if self._read is None:
            return
        for row, read, tokens in zip(self.rows, self._read.tolist(), self.tokens, strict=True):
            row.read += read
            row.available += tokens * self._available
            row.passed += tokens
        for row, place, query in self._queries:
            row.queries.setdefault(place, []).append(query)

    def views(self, asking: Asking) -> Sequence[ContextAttention]:
        """Every full-attention layer, with the thresholds of one budget."""
        if asking not in self._views:
            self._views[asking] = asking.attentions(self.record)
            while len(self._views) > MOST_ASKINGS:
                self._views.popitem(last=False)
        self._views.move_to_end(asking)
        return self._views[asking]

    def groups(self) -> list[tuple[Asking, list[int]]]:
        """Rows with the same settings."""
        found: dict[Asking, list[int]] = {}
        for place, row in enumerate(self.rows):
            found.setdefault(row.ask.asking, []).append(place)
        return list(found.items())

    def note(self, place: int, query: Tensor, found: Attended, selectable: int) -> None:
        """Count what a layer's call read; keep the queries of tokens that are asked about."""
        self._read = found.keys_read.clone() if self._read is None else self._read + found.keys_read
        self._available += selectable
        if not self.answering:
            return
        for index, row in enumerate(self.rows):
            if row.keeps_queries:
                self._queries.append((row, place, query[index : index + 1, :, -1:].clone()))


class SharedLayer(ContextAttention):
    """One layer of a context, read by the rows of `seats`."""

    def __init__(self, place: int, seats: Seats, plain: ContextAttention) -> None:
        self.place, self.seats = place, seats
        self.layer = plain.layer

    def attend(
        self,
        query: Tensor,
        suffix: Suffix | None = None,
        valid: Tensor | None = None,
        per_token: bool = False,
    ) -> Attended:
        groups = self.seats.groups()
        parts = [
            self._part(asking, rows if len(groups) > 1 else None, query, suffix, valid, per_token)
            for asking, rows in groups
        ]
        found = parts[0] if len(parts) == 1 else _woven(parts, [rows for _, rows in groups], query)
        self.seats.note(self.place, query, found, self.selectable_keys)
        return found

    def _part(
        self,
        asking: Asking,
        rows: list[int] | None,
        query: Tensor,
        suffix: Suffix | None,
        valid: Tensor | None,
        per_token: bool,
    ) -> Attended:
        view = self.seats.views(asking)[self.place]
        if rows is None:
            return view.attend(query, suffix, valid, per_token)
        if suffix is not None:
            mask = suffix.mask
            mask = mask if mask is None or mask.shape[0] == 1 else mask[rows]
            suffix = Suffix(suffix.keys[rows], suffix.values[rows], mask)
        return view.attend(query[rows], suffix, None if valid is None else valid[rows], per_token)


def _woven(parts: list[Attended], rows: list[list[int]], query: Tensor) -> Attended:
    """What groups of rows found, in the order of the batch."""
    order = torch.tensor([row for group in rows for row in group]).argsort().to(query.device)
    output, mass, read = (torch.cat(each)[order] for each in zip(*parts, strict=True))
    return Attended(output, mass, read)
