"""What an ended row has to tell: what it spent, and over which passages its attention lay."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from torch import Tensor

from squeezed.answers.sources import NEUTRAL_QUESTION, NEUTRAL_TOKENS
from squeezed.hf.asking import Asking
from squeezed.hf.fixed_context import FixedContext
from squeezed.server.library.found import Entry
from squeezed.server.library.passages import Passages
from squeezed.server.local import reading
from squeezed.server.local.residents import Resident
from squeezed.server.local.rows import Finished, Row
from squeezed.server.port import Ask, Ended, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_USUAL = 256
"""Neutral answers that are remembered, each of a context and settings."""

AskMore = Callable[[Ask, Resident], Awaitable[Row]]
"""Has one more request answered, to its end."""

Cut = Callable[[Entry], Passages]
"""A context's text in passages."""


class Reports:
    """The `squeezed` objects of one engine's answers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ask: AskMore, cut: Cut) -> None:
        self.tokenizer, self.ask, self.cut = tokenizer, ask, cut
        self._usual: dict[tuple[str, Asking], asyncio.Task[Tensor]] = {}

    async def ended(self, finished: Finished, resident: Resident | None) -> Ended:
        row, document = finished.row, 0
        report: dict[str, Any] = {"context": None, "matched": None, "seconds": _seconds(row)}
        if resident is not None:
            document = len(resident.context.tokens)
            report |= await asyncio.to_thread(self._spent, resident.context, row)
            report |= {"context": resident.entry.name, "matched": row.ask.matched}
            if row.ask.passages:
                report |= await self._passages(row, resident)
        return Ended(finished.reason, document, len(row.ask.ids), len(row.answer), report)

    def _spent(self, context: FixedContext, row: Row) -> dict[str, Any]:
        asking = row.ask.asking
        views = asking.attentions(context)
        return {
            "budget": asking.budget,
            "preset": asking.preset,
            "budget_spent": row.read / row.available if row.available else 1.0,
            "keys_read": row.read,
            "bytes_per_token": reading.bytes_read(context, views, row, asking.budget),
        }

    async def _passages(self, row: Row, resident: Resident) -> dict[str, Any]:
        usual = await self._usual_shares(row.ask, resident)
        return await asyncio.to_thread(self._told, row, resident, usual)

    def _told(self, row: Row, resident: Resident, usual: Tensor) -> dict[str, Any]:
        cut, found = self._over(row, resident)
        return reading.passages_told(cut.places, found, usual, row)

    def _over(self, row: Row, resident: Resident) -> tuple[Passages, tuple[Tensor, Tensor]]:
        context, entry = resident.context, resident.entry
        cut = self.cut(entry)
        views = row.ask.asking.attentions(context)
        with torch.inference_mode():
            return cut, reading.attention_over(context, views, row, cut.bounds)

    async def _usual_shares(self, ask: Ask, resident: Resident) -> Tensor:
        """What a neutral question's answer gives each passage; asked once for these settings."""
        key = (resident.entry.key, ask.asking)
        task = self._usual.get(key)
        if task is None or (task.done() and (task.cancelled() or task.exception())):
            if len(self._usual) > MOST_USUAL:
                self._usual.clear()
            task = asyncio.ensure_future(self._ask_neutral(ask, resident))
            self._usual[key] = task
        return await asyncio.shield(task)

    async def _ask_neutral(self, ask: Ask, resident: Resident) -> Tensor:
        template = resident.entry.template
        ids = await asyncio.to_thread(template.question_ids, self.tokenizer, NEUTRAL_QUESTION)
        sampling = Sampling(max_tokens=NEUTRAL_TOKENS)
        neutral = replace(
            ask, id=f"neutral-{uuid4().hex}", ids=ids, sampling=sampling, passages=True
        )
        row = await self.ask(neutral, resident)
        _, (mass, _) = await asyncio.to_thread(self._over, row, resident)
        return reading.shares_of(mass)


def _seconds(row: Row) -> dict[str, float]:
    """From the arrival to the first token, and per token after it."""
    arrived, first, *last = row.times
    further = len(row.answer) - 1
    each = (last[0] - first) / further if last and further else 0.0
    return {"first_token": first - arrived, "per_token": each}
