"""Document + question -> token ids, so that the document is always the same prefix."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from squeezed.context.control_tokens import marked, prompt_ids
from squeezed.context.text import check_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENT, QUESTION = "\x02DOCUMENT\x03", "\x02QUESTION\x03"


@dataclass(frozen=True)
class PromptTemplate:
    """Text around the document and the question.

    The fixed context is `before + document`; a question adds `between + question + after`.

    Attributes:
        keep_control_tokens: let control tokens that stand in a document or question, such as
            `<|im_end|>`, count as such; otherwise they are text, so that no document can end a
            turn.
    """

    before: str
    between: str
    after: str
    keep_control_tokens: bool = False

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, keep_control_tokens: bool = False
    ) -> PromptTemplate:
        """The tokenizer's chat template around both, or a plain form if it has none."""
        if not getattr(tokenizer, "chat_template", None):
            plain = tokenizer.bos_token or "", "\n\nQuestion: ", "\nAnswer:"
            return cls(*plain, keep_control_tokens)
        message = {"role": "user", "content": f"{DOCUMENT}\n\n{QUESTION}"}
        text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        before, rest = text.split(DOCUMENT)
        between, after = rest.split(QUESTION)
        return cls(before, between, after, keep_control_tokens)

    @classmethod
    def plain(cls) -> PromptTemplate:
        """No text at all around document and question."""
        return cls("", "", "")

    def document_ids(self, tokenizer: PreTrainedTokenizerBase, document: str) -> Tensor:
        """Ids of the fixed context, `[P]` int64; `SqueezedError` for what is no text."""
        return self._ids(tokenizer, self.before, check_text("text", document), "", True)

    def further_ids(self, tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
        """Ids of a text that continues the document, `[n]` int64, tokenised by itself: no token
        crosses the border, and none of the document's changes; `SqueezedError` as above."""
        return self._ids(tokenizer, "", check_text("text", text), "", False)

    def question_ids(self, tokenizer: PreTrainedTokenizerBase, question: str) -> Tensor:
        """Ids of what follows the fixed context, `[S]` int64; `SqueezedError` as above."""
        return self._ids(
            tokenizer, self.between, check_text("question", question), self.after, False
        )

    def marked(
        self, tokenizer: PreTrainedTokenizerBase, text: str, written: Collection[int] = ()
    ) -> str:
        """`text` with its control tokens marked as text, unless they are to be kept.

        Args:
            written: ids that it was decoded from, if a model wrote it.
        """
        if self.keep_control_tokens:
            return text
        return marked(tokenizer, text, self.written, written)

    def is_chat_of(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether this is the tokenizer's chat template; what stands before may carry a date."""
        if not getattr(tokenizer, "chat_template", None):
            return False
        try:
            own = PromptTemplate.of(tokenizer)
        except Exception:  # a chat template that has no place for a document made no context
            return False
        return (own.between, own.after) == (self.between, self.after)

    @property
    def written(self) -> str:
        return self.before + self.between + self.after

    def _ids(
        self,
        tokenizer: PreTrainedTokenizerBase,
        before: str,
        content: str,
        after: str,
        begins: bool,
    ) -> Tensor:
        text = before + self.marked(tokenizer, content) + after
        return torch.tensor(prompt_ids(tokenizer, text, self.written, begins), dtype=torch.long)


def continued_ids(tokenizer: PreTrainedTokenizerBase, text: str, template: str = "") -> Tensor:
    """Ids of a text that continues another one, `[S]` int64; see `control_tokens.prompt_ids`."""
    return torch.tensor(prompt_ids(tokenizer, text, template or text, False), dtype=torch.long)
