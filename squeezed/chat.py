"""Several questions over one context: each turn continues the same cache."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from squeezed.context import FixedContext
from squeezed.engine import Answer, check_tokenizer, respond
from squeezed.hf.cache import SqueezedCache
from squeezed.prompt import QUESTION

ANSWER = "\x02ANSWER\x03"


@dataclass
class Chat:
    """A conversation about a context.

    Attributes:
        cache: made by `context.cache(...)`; grows with every turn.
        pending: `[n]` int64, generated tokens that the cache has not seen: `generate()` never feeds
            the last one back.
    """

    model: object
    tokenizer: object
    context: FixedContext
    cache: SqueezedCache
    pending: Tensor | None = field(default=None)

    def __post_init__(self) -> None:
        check_tokenizer(self.tokenizer, self.context)

    def ask(self, question: str, **generate_arguments) -> Answer:
        """Answer the next question; spending is counted anew for every turn."""
        if self.pending is None:
            ids = self.context.template.question_ids(self.tokenizer, question)
        else:
            ids = torch.cat([self.pending, self._turn_ids(question)])
        self.cache.restart_spending()
        self.cache.watch_queries()
        answer = respond(self.model, self.tokenizer, self.cache, ids, **generate_arguments)
        self.pending = self._unseen(answer.tokens)
        return answer

    def _turn_ids(self, question: str) -> Tensor:
        before, after = turn_template(self.tokenizer, self.context.template)
        ids = self.tokenizer(before + question + after, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.long)

    def _unseen(self, tokens: Tensor) -> Tensor:
        """The last token, unless it ended the turn: the template of the next turn says so."""
        ended = int(tokens[-1]) in _end_tokens(self.model)
        return tokens[:0] if ended else tokens[-1:]


def turn_template(tokenizer, template) -> tuple[str, str]:
    """Text between an answer and the next question, and between that and its answer."""
    if not getattr(tokenizer, "chat_template", None):
        return template.between, template.after
    turns = [
        {"role": "user", "content": "-"},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": QUESTION},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    between, after = text.split(ANSWER)[1].split(QUESTION)
    return between, after


def _end_tokens(model) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, (list, tuple)) else {ends}
