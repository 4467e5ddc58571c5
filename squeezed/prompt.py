"""Document + question -> token ids, so that the document is always the same prefix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DOCUMENT, QUESTION = "\x02DOCUMENT\x03", "\x02QUESTION\x03"


PROBE = (
    "What is this about, and what are its main points? Which names, numbers, dates and places does "
    "it give, and what do they mean? How does it work, why was it done, and what are the "
    "exceptions? Explain the most important part in a few sentences, and say where it is described."
)
EXCERPT_CHARACTERS = 120


def probe_question(document: str) -> str:
    """A question that calibrates: what people ask of any text, and two excerpts of this one.

    Queries of the document's own last tokens look back at their neighbours; thresholds fitted on
    them let real questions read a quarter more than asked (DESIGN.md).
    """
    starts = (len(document) // 3, 2 * len(document) // 3)
    excerpts = (document[start : start + EXCERPT_CHARACTERS] for start in starts)
    return " ".join([PROBE, *(" ".join(excerpt.split()) for excerpt in excerpts)])


@dataclass(frozen=True)
class PromptTemplate:
    """Text around the document and the question.

    The fixed context is `before + document`; a question adds `between + question + after`.
    """

    before: str
    between: str
    after: str

    @classmethod
    def of(cls, tokenizer) -> PromptTemplate:
        """The tokenizer's chat template around both, or a plain form if it has none."""
        if not getattr(tokenizer, "chat_template", None):
            return cls(tokenizer.bos_token or "", "\n\nQuestion: ", "\nAnswer:")
        message = {"role": "user", "content": f"{DOCUMENT}\n\n{QUESTION}"}
        text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        before, rest = text.split(DOCUMENT)
        between, after = rest.split(QUESTION)
        return cls(before, between, after)

    @classmethod
    def plain(cls) -> PromptTemplate:
        """No text at all around document and question."""
        return cls("", "", "")

    def document_ids(self, tokenizer, document: str) -> Tensor:
        """Ids of the fixed context, `[P]` int64."""
        return _ids(tokenizer, self.before + document)

    def question_ids(self, tokenizer, question: str) -> Tensor:
        """Ids of what follows the fixed context, `[S]` int64."""
        return continued_ids(tokenizer, self.between + question + self.after)

    def is_chat_of(self, tokenizer) -> bool:
        """Whether this is the tokenizer's chat template; what stands before may carry a date."""
        if not getattr(tokenizer, "chat_template", None):
            return False
        try:
            own = PromptTemplate.of(tokenizer)
        except Exception:  # a chat template that has no place for a document made no context
            return False
        return (own.between, own.after) == (self.between, self.after)


ANCHORS = ("a", "\n", ".", "0")
"""Texts behind which a piece is tokenised as inside a text, if no token crosses the seam."""


def continued_ids(tokenizer, text: str) -> Tensor:
    """Ids of a text that continues another one, `[S]` int64.

    Some tokenizers (SentencePiece) put a mark before the first word of whatever they are given. So
    the text is tokenised behind others, and what belongs to those is cut off.
    """
    alone = _ids(tokenizer, text)
    found = []
    for anchor in ANCHORS:
        before, both = _ids(tokenizer, anchor), _ids(tokenizer, anchor + text)
        if both[: len(before)].equal(before):
            found.append(both[len(before) :])
    if not found or any(ids.equal(alone) for ids in found):
        return alone
    return found[0]


def _ids(tokenizer, text: str) -> Tensor:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)
