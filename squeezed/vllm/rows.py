"""The rows of a batch that read contexts, in groups that one call answers.

A row is one request's new tokens. Generated tokens over one context, by one rule, are answered
together; a row of the prompt's tokens is answered part by part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from squeezed.vllm.news import Reader

WHOLE, BLOCKS, ALONE = "whole", "blocks", "alone"


@dataclass(frozen=True)
class Row:
    """One request's new tokens in a step.

    Attributes:
        place: its row in the batch.
        start, stop: its tokens in the batch.
        length: tokens of the request, the context's and the new ones included.
        reader: `None` for a request without a context.
    """

    place: int
    start: int
    stop: int
    length: int
    request: str = ""
    reader: Reader | None = None

    @property
    def new(self) -> int:
        return self.stop - self.start

    @property
    def first(self) -> int:
        """Place of the first new token in its request."""
        return self.length - self.new

    def parts(self, single_tokens: int) -> list[tuple[str, slice]]:
        """How its new tokens read the context, part by part.

        `WHOLE`: the document's own last tokens read all of it. `BLOCKS`: tokens of the prompt that
        select in blocks. `ALONE`: the prompt's last ones and generated ones. Where a part ends does
        not hang on chunks: neither the crowd in a batch nor a preemption may change what a token
        reads.
        """
        assert self.reader is not None  # its context is read
        document = self._within(self.reader.document_tokens)
        early = max(document, self._within(self.reader.prompt_tokens - single_tokens))
        ends = (0, document, early, self.new)
        named = zip((WHOLE, BLOCKS, ALONE), ends[:-1], ends[1:], strict=True)
        return [(kind, slice(start, stop)) for kind, start, stop in named if start < stop]

    def _within(self, place: int) -> int:
        """How many of the new tokens stand before a place in the request."""
        return min(self.new, max(0, place - self.first))


@dataclass
class Groups:
    """A step's rows: `decodes` in lists that one call answers, `prefills` one by one."""

    decodes: list[list[Row]]
    prefills: list[Row]
    plain: list[Row]

    @property
    def has_contexts(self) -> bool:
        return bool(self.decodes or self.prefills)


def rows_of(
    starts: Sequence[int],
    lengths: Sequence[int],
    request_of: Callable[[int], str | None],
    readers: dict[str, Reader],
) -> list[Row]:
    """Every row of a batch.

    Args:
        starts: first token of each row, and the end of the last.
        lengths: tokens of each row's request.
        request_of: id of a row's request, if it is known.
    """
    rows = []
    for place, length in enumerate(lengths):
        request = request_of(place)
        reader = readers.get(request) if request is not None else None
        rows.append(Row(place, starts[place], starts[place + 1], length, request or "", reader))
    return rows


def grouped(rows: Sequence[Row]) -> Groups:
    """Rows over contexts in groups, in the order of the batch."""
    decodes: dict[tuple, list[Row]] = {}
    found = Groups([], [], [])
    for row in rows:
        if row.reader is None:
            found.plain.append(row)
        elif row.new == 1 and row.first >= row.reader.prompt_tokens - 1:
            decodes.setdefault(row.reader.rule, []).append(row)
        else:
            found.prefills.append(row)
    found.decodes = list(decodes.values())
    return found
