"""One request inside the engine: its tokens, its text, and what it read."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from squeezed.server.local.choosing import Chooser, Chosen
from squeezed.server.local.words import Words
from squeezed.server.port import Ask, Piece, TokenSaid

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STOP, LENGTH = "stop", "length"


@dataclass(frozen=True)
class Finished:
    """The last that a ticket is told: a row that ended, and why."""

    row: Row
    reason: str


class Ticket:
    """What the engine's thread says to the task that waits for an answer.

    Attributes:
        left: nobody waits any more; set by the task, looked at between two tokens.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.said: asyncio.Queue[Piece | Finished | BaseException] = asyncio.Queue()
        self.left = False

    def say(self, what: Piece | Finished | BaseException) -> None:
        with suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(self.said.put_nowait, what)


@dataclass
class Row:
    """A request, from its place in the queue to its last token.

    Attributes:
        offsets: where the text of each token of `answer` begins, in characters.
        read: keys read exactly over layers and KV heads, by question and answer.
        available: keys that could have been.
        passed: tokens of its own that went through the model.
        queries: of the answer, by layer: `[1, Hq, 1, D]` each; all if its passages are asked for,
            else those of the tokens 1, 2, 4, 8, ....
        times: of its arrival, of its first and of its last token.
    """

    ask: Ask
    ticket: Ticket
    words: Words
    chooser: Chooser
    ends: frozenset[int]
    answer: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    read: int = 0
    available: int = 0
    passed: int = 0
    queries: dict[int, list[Tensor]] = field(default_factory=dict)
    times: list[float] = field(default_factory=lambda: [time.perf_counter()])
    done: bool = False

    @classmethod
    def of(
        cls, ask: Ask, ticket: Ticket, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]
    ) -> Row:
        return cls(ask, ticket, Words(tokenizer, ask.sampling.stop), Chooser(ask.sampling), ends)

    @property
    def keeps_queries(self) -> bool:
        """Whether the queries of the pass that makes the next token are kept."""
        made = len(self.answer) + 1
        return self.ask.passages or made & (made - 1) == 0

    def take(self, logits: Tensor) -> None:
        """Choose the next token from `[V]` float32, and say what is certain of the text."""
        chosen = self.chooser.choose(logits)
        self.answer.append(chosen.token)
        self.offsets.append(self.words.written)
        now = time.perf_counter()
        self.times = [*self.times[:2], now]
        ended = chosen.token in self.ends
        text = self.words.add(chosen.token)
        full = len(self.answer) >= self.ask.sampling.max_tokens
        if ended or (full and not self.words.stopped):
            text += self.words.rest()
        told = () if chosen.logprob is None else (self._told(chosen),)
        if text or told:
            self.ticket.say(Piece(text, told))
        if ended or full or self.words.stopped:
            self.end(STOP if ended or self.words.stopped else LENGTH)

    def end(self, reason: str) -> None:
        self.done = True
        self.ticket.say(Finished(self, reason))

    def fail(self, error: BaseException) -> None:
        self.done = True
        self.ticket.say(error)

    def _told(self, chosen: Chosen) -> TokenSaid:
        decode = self.words.tokenizer.decode
        top = tuple((token, str(decode([token])), value) for token, value in chosen.top)
        text, offset = str(decode([chosen.token])), self.offsets[-1]
        return TokenSaid(chosen.token, text, offset, chosen.logprob, top)
