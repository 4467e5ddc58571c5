"""Messages and texts -> the ids that follow a context, and which context that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from squeezed.context.control_tokens import prompt_ids
from squeezed.context.prompt import DOCUMENT, PromptTemplate, continued_ids
from squeezed.context.text import check_text
from squeezed.errors import SqueezedError
from squeezed.server.library.found import Entry
from squeezed.server.library.library import Library, names_none
from squeezed.server.refusals import Refusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_CHARACTERS = 32
"""Characters of a token, on average over a prompt."""

Said = Sequence[tuple[str, str]]
"""Messages: role and text."""


@dataclass(frozen=True)
class Prompt:
    """What is asked: `ids` `[S]` int64 behind the context `entry`, or alone."""

    entry: Entry | None
    ids: Tensor


@dataclass(frozen=True)
class Prompts:
    """Prompts of one tokenizer over one library."""

    tokenizer: PreTrainedTokenizerBase
    library: Library
    keep_control_tokens: bool = False
    max_tokens: int = 1 << 40

    @property
    def template(self) -> PromptTemplate:
        return PromptTemplate.of(self.tokenizer, self.keep_control_tokens)

    def chat(self, said: Said, context: str | None) -> Prompt:
        """Of a conversation. With a context its document stands first in the first question.

        Raises:
            Refusal: no such context.
            SqueezedError: a text that cannot be encoded, or a template that has no place for it.
        """
        self._check_length(sum(len(text) for _, text in said), context)
        for place, (_, text) in enumerate(said):
            check_text(f"messages[{place}]", text)
        if context is None or names_none(context):
            ids = self._whole(said)
            return Prompt(None, ids) if context else self._matched(ids)
        entry = self.library.named(context)
        return Prompt(entry, self._after(entry.template, behind_document(said)))

    def text(self, prompt: str | list[int], context: str | None) -> Prompt:
        """Of `/v1/completions`: what follows the document as it is, without a template."""
        entry = None if context is None or names_none(context) else self.library.named(context)
        self._check_length(len(prompt), context)
        if isinstance(prompt, list):
            ids = self._known(prompt)
        else:
            text = self.template.marked(self.tokenizer, check_text("prompt", prompt))
            ids = continued_ids(self.tokenizer, text) if entry else self._from_start(text)
        if not len(ids):
            raise SqueezedError("prompt: it has no tokens; ask something")
        return Prompt(entry, ids) if context else self._matched(ids)

    def _check_length(self, characters: int, context: str | None) -> None:
        """Raise `Refusal` for a text that is too long whatever its tokens are, before they are
        looked for: that takes its time, and other prompts wait for it."""
        most = self.max_tokens
        if context is None:
            most += max((len(entry.tokens) for entry in self.library.entries()), default=0)
        if characters > MOST_CHARACTERS * most:
            raise Refusal(
                400,
                f"prompt: it has {characters:,} characters, which is more than {most:,} tokens can "
                "hold; make a context of the long part, with POST /v1/contexts",
                "prompt",
                "context_length_exceeded",
            )

    def _matched(self, ids: Tensor) -> Prompt:
        entry = self.library.longest(ids)
        return Prompt(entry, ids if entry is None else ids[len(entry.tokens) :])

    def _known(self, ids: list[int]) -> Tensor:
        most = len(self.tokenizer)
        if any(not 0 <= token < most for token in ids):
            raise SqueezedError(f"prompt: expected ids of tokens from 0 to {most - 1}")
        return torch.tensor(ids, dtype=torch.long)

    def _from_start(self, text: str) -> Tensor:
        begin = "" if self.tokenizer.chat_template else self.tokenizer.bos_token or ""
        ids = prompt_ids(self.tokenizer, begin + text, begin, True)
        return torch.tensor(ids, dtype=torch.long)

    def _whole(self, said: Said) -> Tensor:
        """Ids of a conversation without a context, from its beginning."""
        own = self.template
        marked = [(role, own.marked(self.tokenizer, text)) for role, text in said]
        if not self.tokenizer.chat_template:
            text = own.before + _plain(own, behind_document(marked), first="")
            return torch.tensor(prompt_ids(self.tokenizer, text, own.written, True))
        text = self._rendered(marked)
        return torch.tensor(prompt_ids(self.tokenizer, text, text, True), dtype=torch.long)

    def _after(self, template: PromptTemplate, said: Said) -> Tensor:
        """Ids of all that follows the document."""
        marked = [(role, template.marked(self.tokenizer, text)) for role, text in said]
        if not template.is_chat_of(self.tokenizer):
            text = _plain(template, marked, first=template.between)
            return continued_ids(self.tokenizer, text, template.written)
        (role, question), *rest = marked
        text = self._rendered([(role, f"{DOCUMENT}{template.between}{question}"), *rest])
        before, *after = text.split(DOCUMENT)
        if len(after) != 1 or before != self.template.before:
            raise SqueezedError(
                "messages: this model's chat template changes what stands before the document when "
                "a conversation goes on; ask each question by itself"
            )
        return continued_ids(self.tokenizer, after[0])

    def _rendered(self, said: Said) -> str:
        messages = [{"role": "system" if r == "developer" else r, "content": t} for r, t in said]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
            )
        except Exception as error:  # a template raises what it likes
            raise SqueezedError(
                f"messages: this model's chat template refuses them ({error})"
            ) from error


def behind_document(said: Said) -> list[tuple[str, str]]:
    """A conversation whose instructions stand in its first question: the document comes before.

    Raises:
        SqueezedError: an answer stands before the first question.
    """
    system = [text for role, text in said if role in ("system", "developer")]
    turns = [(role, text) for role, text in said if role in ("user", "assistant")]
    if turns[0][0] != "user":
        raise SqueezedError("messages: expected a message of the user before the first answer")
    first = "\n\n".join([*system, turns[0][1]])
    return [("user", first), *turns[1:]]


def _plain(template: PromptTemplate, said: Said, first: str) -> str:
    """A conversation in the plain form of a model without a chat template."""
    parts, between = [], first
    for role, text in said:
        parts.append(between + text + template.after if role == "user" else f" {text}")
        between = template.between
    return "".join(parts)
