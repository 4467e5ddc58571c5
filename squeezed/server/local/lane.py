"""The requests over one context: they wait, join the batch between two tokens, and leave it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from squeezed.server.local.batch import Batch, Shared
from squeezed.server.local.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from squeezed.hf.fixed_context import FixedContext

log = logging.getLogger("squeezed")

CHUNK_TOKENS = 512
"""Tokens of a long prompt that are read in one turn: others' tokens come between."""

TOGETHER_TOKENS = 128
"""Prompts of at most so many tokens are read together: each token selects alone in all of them."""

TOGETHER_ROWS = 8


class Lane:
    """One context, or none, and who asks about it.

    `add` may be called from any thread; the rest belongs to the engine's.
    """

    def __init__(self, model: PreTrainedModel, context: FixedContext | None, most: int) -> None:
        self.shared, self.most = Shared(model, context), most
        self.waiting: deque[Row] = deque()
        self.batch: Batch | None = None
        self.joining: Batch | None = None
        self._unread: list[Tensor] = []

    def add(self, row: Row) -> None:
        self.waiting.append(row)

    @property
    def running(self) -> int:
        return sum(len(batch.rows) for batch in (self.batch, self.joining) if batch)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.batch or self.joining)

    def turn(self) -> None:
        """Read a piece of the next prompts, and write one token of every answer."""
        self._drop_left()
        if self.joining is None:
            self._admit()
        if self.joining is not None:
            self._read_prompts()
        if self.batch is not None:
            self._write_tokens()

    def fail(self, error: BaseException) -> None:
        """End every request with an error."""
        rows = [*self.waiting, *(row for b in (self.batch, self.joining) if b for row in b.rows)]
        self.waiting.clear()
        self.batch = self.joining = None
        for row in rows:
            if not row.done:
                row.fail(error)

    def _drop_left(self) -> None:
        """Free the places of clients that left."""
        for _ in range(len(self.waiting)):
            row = self.waiting.popleft()
            if not row.ticket.left:
                self.waiting.append(row)
        if self.joining is not None and any(row.ticket.left for row in self.joining.rows):
            stay = [row for row in self.joining.rows if not row.ticket.left]
            self.joining = None
            self.waiting.extendleft(reversed(stay))  # to be read anew
        self.batch = _kept(self.batch)

    def _admit(self) -> None:
        """Begin the prompts that wait longest: one long one, or several short ones together."""
        room = min(self.most - self.running, TOGETHER_ROWS)
        rows: list[Row] = []
        while self.waiting and len(rows) < room:
            short = len(self.waiting[0].ask.ids) <= TOGETHER_TOKENS
            if rows and not short:
                break
            rows.append(self.waiting.popleft())
            if not short:
                break
        if rows:
            self._begin(rows)

    def _begin(self, rows: Sequence[Row]) -> None:
        try:
            self.joining = Batch(self.shared, rows)
        except Exception as error:
            _fail(rows, error)
            return
        first, *_ = rows
        self._unread = list(first.ask.ids.split(CHUNK_TOKENS)) if len(rows) == 1 else []

    def _read_prompts(self) -> None:
        """One pass over what is joining; with its last the rows get their first tokens."""
        batch = self.joining
        assert batch is not None
        pieces = [row.ask.ids for row in batch.rows]
        if self._unread:
            pieces = [self._unread.pop(0)]
        last = not self._unread
        try:
            logits = batch.read(pieces, answering=last)
        except Exception as error:
            self.joining, self._unread = None, []
            self._apart(batch.rows, error)
            return
        if not last:
            return
        self.joining = None
        _take(batch.rows, logits)
        joined = _kept(batch)
        if joined is not None:
            self._join(joined)

    def _join(self, joined: Batch) -> None:
        if self.batch is None:
            self.batch = joined
            return
        try:
            self.batch.join(joined)
        except Exception as error:  # no memory for more of them
            _fail(joined.rows, error)

    def _apart(self, rows: Sequence[Row], error: Exception) -> None:
        """After a failure: one row fails alone, several are read one by one."""
        if len(rows) == 1:
            _fail(rows, error)
            return
        for row in rows:
            alone = Batch(self.shared, [row])
            try:
                logits = alone.read([row.ask.ids], answering=True)
            except Exception as its:
                _fail([row], its)
                continue
            _take([row], logits)
            kept = _kept(alone)
            if kept is not None:
                self._join(kept)

    def _write_tokens(self) -> None:
        batch = self.batch
        assert batch is not None
        try:
            logits = batch.read([torch.tensor(row.answer[-1:]) for row in batch.rows], True)
        except Exception as error:
            self.batch = None
            self._write_apart(batch, error)
            return
        _take(batch.rows, logits)
        self.batch = _kept(batch)

    def _write_apart(self, batch: Batch, error: Exception) -> None:
        """After a failure: the rows that go on alone go on together, the others end."""
        if len(batch.rows) == 1:
            _fail(batch.rows, error)
            return
        for place, row in enumerate(batch.rows):
            try:
                alone = batch.alone(place)
                logits = alone.read([torch.tensor(row.answer[-1:])], True)
            except Exception as its:
                _fail([row], its)
                continue
            _take([row], logits)
            kept = _kept(alone)
            if kept is not None:
                self._join(kept)


def _take(rows: Sequence[Row], logits: Tensor) -> None:
    """Give every row its logits `[V]`; what one of them cannot do is its own failure."""
    for row, own in zip(rows, logits, strict=True):
        try:
            row.take(own)
        except Exception as error:
            _fail([row], error)


def _kept(batch: Batch | None) -> Batch | None:
    """A batch without the rows that have ended, or whose clients left."""
    if batch is None:
        return None
    places = [i for i, row in enumerate(batch.rows) if not (row.done or row.ticket.left)]
    if not places:
        return None
    batch.keep(places)
    return batch


def _fail(rows: Sequence[Row], error: BaseException) -> None:
    for row in rows:
        log.warning("%s failed: %s: %s", row.ask.id, type(error).__name__, error)
        row.fail(error)
