"""The rows of a batch that read contexts, in groups that one call answers.

A row is one request's new tokens. Rows with one new token over one context, by one rule, decode
together; a row with more is a call of its own, in a part that selects by blocks and one whose
tokens select alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from squeezed.vllm.news import Reader


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

    def in_blocks(self, single_tokens: int) -> int:
        """How many of its new tokens select in blocks: those before the prompt's last ones.

        Counted from the prompt's end and not the chunk's, for neither the crowd in a batch nor a
        preemption may change what a token reads.
        """
        first = self.length - self.new
        return min(self.new, max(0, self.reader.prompt_tokens - single_tokens - first))


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
        elif row.new == 1:
            rule = row.reader.key, row.reader.budget, row.reader.preset
            decodes.setdefault(rule, []).append(row)
        else:
            found.prefills.append(row)
    found.decodes = list(decodes.values())
    return found
