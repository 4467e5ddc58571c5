"""The engine over Transformers: one model, a loop for its answers, contexts in memory."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from squeezed import engine
from squeezed.answers.session import Session
from squeezed.context.prompt import PromptTemplate
from squeezed.context.record import ContextRecord
from squeezed.costs.memory import free_bytes
from squeezed.errors import ContextFileError, SqueezedError
from squeezed.hf.arguments import Wishes
from squeezed.hf.fixed_context import FixedContext
from squeezed.hf.identity.vocabulary import tokenizer_fingerprint
from squeezed.hf.positions import check_room
from squeezed.hf.support import input_device, layer_kinds, text_config
from squeezed.server.library.found import Entry
from squeezed.server.library.passages import Passages
from squeezed.server.local.lane import Lane
from squeezed.server.local.loop import Loop
from squeezed.server.local.reports import Reports
from squeezed.server.local.residents import Resident, Residents
from squeezed.server.local.rows import Finished, Row, Ticket
from squeezed.server.port import Ask, Ended, Piece, Progress
from squeezed.server.refusals import Refusal, refusal_of
from squeezed.system.failures import readable_failures
from squeezed.vllm.catalogue import version_of
from squeezed.vllm.cutting import Share, bytes_on

if TYPE_CHECKING:
    pass

log = logging.getLogger("squeezed")

GIB = 1 << 30
UNKNOWN_MEMORY = 4 * GIB
"""For contexts, where the system does not say how much there is."""


@dataclass(frozen=True)
class Limits:
    """What the local engine may take.

    Attributes:
        rows: answers written together over one context.
        queue: requests that may wait, over all contexts.
        context_memory: bytes for contexts; 0 is half of what is free.
        document_tokens: longest document.
    """

    rows: int = 32
    queue: int = 256
    context_memory: int = 0
    document_tokens: int = 1_000_000
    keep_control_tokens: bool = False


class LocalEngine:
    """See `squeezed.server.port.Engine`. Made inside the event loop that it serves."""

    def __init__(self, session: Session, limits: Limits) -> None:
        self.session, self.limits = session, limits
        self.model, self.tokenizer = session.model, session.tokenizer
        self.positions = getattr(text_config(self.model), "max_position_embeddings", None)
        self.ends = frozenset(Wishes(self.model, {}).end_tokens)
        free = free_bytes(input_device(self.model)) or 2 * UNKNOWN_MEMORY
        capacity = limits.context_memory or free // 2
        self.is_pinned: Callable[[str], bool] = lambda name: False
        self.residents = Residents(self._load, capacity, lambda name: self.is_pinned(name))
        self.loop = Loop()
        self.cut: Callable[[Entry], Passages] = partial(Passages.of_entry, self.tokenizer)
        self.reports = Reports(self.tokenizer, self._asked_more, lambda entry: self.cut(entry))
        self.asked: Counter[str] = Counter()
        self._one_document = asyncio.Lock()

    async def answer(self, ask: Ask) -> AsyncGenerator[Piece | Ended, None]:
        key = "" if ask.entry is None else ask.entry.key
        self._check_queue(key)
        self.asked[key] += 1
        resident: Resident | None = None
        try:
            self._check_room(ask)
            if ask.entry is not None:
                resident = await self.residents.read(ask.entry)
            async for said in self._answered(ask, resident):
                yield said
        finally:
            self.asked[key] -= 1
            self.asked += Counter()  # forget those at 0
            if resident is not None:
                self.residents.leave(resident)

    @property
    def under_way(self) -> int:
        """Requests that are answered, or wait to be."""
        return self.asked.total()

    def _check_queue(self, key: str) -> None:
        """Raise `Refusal` if a request would have to wait, and too many do."""
        rows, most = self.limits.rows, self.limits.queue
        waiting = sum(max(0, count - rows) for count in self.asked.values())
        if self.asked[key] >= rows and waiting >= most:
            raise Refusal(429, f"{most} requests wait already; try later", None, "queue_full", 1)

    def _check_room(self, ask: Ask) -> None:
        if not len(ask.ids):
            raise SqueezedError("prompt: it has no tokens; ask something")
        document = 0 if ask.entry is None else len(ask.entry.tokens)
        prompt, new = document + len(ask.ids), ask.sampling.max_tokens
        check_room(self.model, document, prompt, new)
        longest = self.positions
        if longest and prompt + new - 1 > longest:
            raise Refusal(
                400,
                f"max_tokens: {prompt:,} tokens of prompt and {new:,} of answer pass the "
                f"{longest:,} positions of this model; ask for fewer",
                "max_tokens",
                "context_length_exceeded",
            )

    async def _answered(
        self, ask: Ask, resident: Resident | None
    ) -> AsyncGenerator[Piece | Ended, None]:
        row = self._added(ask, resident)
        try:
            while True:
                said = await row.ticket.said.get()
                if isinstance(said, BaseException):
                    raise refusal_of(said)
                if isinstance(said, Finished):
                    break
                yield said
        finally:
            row.ticket.left = True
            self.loop.wake()
        yield await self.reports.ended(said, resident)

    async def _asked_more(self, ask: Ask, resident: Resident) -> Row:
        """One more request over a context that is being read, from its beginning to its end."""
        row = self._added(ask, resident)
        while not isinstance(said := await row.ticket.said.get(), Finished):
            if isinstance(said, BaseException):
                raise refusal_of(said)
        return row

    def _added(self, ask: Ask, resident: Resident | None) -> Row:
        row = Row.of(ask, Ticket(), self.tokenizer, self.ends)
        key = "" if resident is None else resident.entry.key
        context = None if resident is None else resident.context
        self.loop.add(key, lambda: Lane(self.model, context, self.limits.rows), row)
        return row

    async def index(self, text: str, path: Path, progress: Progress) -> None:
        async with self._one_document:
            await asyncio.to_thread(self._index, text, path, progress)

    def _index(self, text: str, path: Path, progress: Progress) -> None:
        template = PromptTemplate.of(self.tokenizer, self.limits.keep_control_tokens)

        def limited(phase: str, done: int, total: int) -> None:
            """The first chunk tells how long the document is: to count twice would take longer."""
            most = self.limits.document_tokens
            if phase == "prefill" and total > most:
                raise SqueezedError(
                    f"text: the document has {total:,} tokens, at most {most:,} are taken here; "
                    "cut it in two"
                )
            progress(phase, done, total)

        made = self.session.index(text, None, None, template, limited)
        progress("save", 0, 1)
        made.save(path)

    async def append(self, text: str, path: Path, progress: Progress) -> None:
        async with self._one_document:
            await asyncio.to_thread(self._append, text, path, progress)

    def _append(self, text: str, path: Path, progress: Progress) -> None:
        """Into a new version, which takes the old one's place if that is still there."""
        version, most = version_of(path), self.limits.document_tokens
        old = engine.load(path, self.model)
        tokens = len(old.tokens) + len(old.template.further_ids(self.tokenizer, text))
        if tokens > most:
            raise SqueezedError(
                f"text: the document would have {tokens:,} tokens, at most {most:,} are taken "
                "here; make another context of it"
            )
        grown = engine.append(self.model, self.tokenizer, old, text, 1.0, progress)
        progress("save", 0, 1)
        if version_of(path) != version:
            raise SqueezedError("context: it was changed while text was appended; try again")
        grown.save(path)

    @readable_failures()
    def _load(self, entry: Entry) -> FixedContext:
        context = engine.load(entry.path, self.model)
        engine.check_tokenizer(self.tokenizer, context)
        if not context.tokens.equal(entry.tokens):
            raise ContextFileError(f"context: {entry.name} was replaced; ask again")
        for place in range(len(context.layers)):
            _ = context.layers[place]
        return context

    def measured(self, record: ContextRecord) -> int:
        tokens, whole = len(record.tokens), Share()
        return sum(bytes_on(outline, tokens, whole) for outline in record.outlines)

    def check(self, record: ContextRecord) -> None:
        if record.tokenizer != tokenizer_fingerprint(self.tokenizer):
            raise ContextFileError("it was made with another tokenizer")
        if len(record.outlines) != len(layer_kinds(self.model)):
            raise ContextFileError("it was made with another model")

    def resident(self) -> set[str]:
        return self.residents.names()

    def forget(self, name: str) -> None:
        self.residents.forget(name)

    def numbers(self) -> dict[str, float]:
        running, _ = self.loop.counts()
        return {
            "answers_running": running,
            "answers_waiting": max(0, self.under_way - running),
            "contexts_resident": len(self.residents.names()),
            "resident_bytes": self.residents.used,
            "capacity_bytes": self.residents.capacity,
            "context_loads": self.residents.loads,
            "context_evictions": self.residents.evictions,
        }

    async def close(self, grace: float) -> None:
        await asyncio.to_thread(self.loop.end, grace)
        self.session.close()
