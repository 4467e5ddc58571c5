"""A context's text, cut into the passages that answers are read by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from squeezed.answers.sources import characters, passage_bounds
from squeezed.context.prompt import PromptTemplate

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from squeezed.server.library.found import Entry


@dataclass(frozen=True)
class Passages:
    """The document as text, and its passages, which together are all of it.

    Attributes:
        text: decoded from the context's tokens, without the template before it.
        places: of every passage, first and last character (end excluded).
        bounds: of every passage, first and last token in the context (end excluded).
    """

    text: str
    places: tuple[tuple[int, int], ...]
    bounds: tuple[tuple[int, int], ...]

    @classmethod
    def of_entry(cls, tokenizer: PreTrainedTokenizerBase, entry: Entry) -> Passages:
        """Of a saved context."""
        return cls.of(tokenizer, entry.tokens, entry.template)

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, tokens: Tensor, template: PromptTemplate
    ) -> Passages:
        begin = template_tokens(tokenizer, tokens, template)
        own = tokens[begin:]
        bounds = passage_bounds(tokenizer, own)
        units, text, places, place = characters(tokenizer, own), [], [], 0
        taken = 0
        for _, end in bounds:
            start = place
            while taken < len(units) and units[taken][0] <= end:
                text.append(units[taken][1])
                place += len(units[taken][1])
                taken += 1
            places.append((start, place))
        whole = tuple((begin + start, begin + end) for start, end in bounds)
        return cls("".join(text), tuple(places), whole)


def template_tokens(
    tokenizer: PreTrainedTokenizerBase, tokens: Tensor, template: PromptTemplate
) -> int:
    """How many of a context's first tokens its template wrote."""
    before = template.document_ids(tokenizer, "")
    count = min(len(before), len(tokens) - 1)
    alike = before[:count] == tokens[:count]
    return int(alike.to(torch.int64).cumprod(0).sum())
