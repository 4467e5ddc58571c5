"""Several questions over one context: each turn continues the same cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event, get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from squeezed.answers.stream import Listener, Stream
from squeezed.config import LEAST_FOLDED, GrowthConfig
from squeezed.context.prompt import DOCUMENT, QUESTION, PromptTemplate, continued_ids
from squeezed.context.text import check_text
from squeezed.engine import check_maker
from squeezed.errors import SqueezedError, whole
from squeezed.hf.answer import Answer, Request
from squeezed.hf.arguments import ASSISTED, Wishes
from squeezed.hf.asking import Asking
from squeezed.hf.cache import SqueezedCache
from squeezed.hf.fixed_context import FixedContext
from squeezed.hf.folding import Folding, fold
from squeezed.system.forks import Turns

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ANSWER = "\x02ANSWER\x03"


@dataclass(frozen=True)
class Turn:
    """A question and its answer: `[n]` int64, without the token that ended it."""

    question: str
    answer: Tensor


@dataclass
class Chat:
    """A conversation about a context.

    Every turn is the whole conversation written anew, of which the cache holds the beginning. So a
    template may rewrite what was said, and a turn that was interrupted never was.

    Attributes:
        cache: made by `context.cache(...)`; grows with every turn.
        turns: what was asked and answered so far; of several sequences the first goes on.
        asking: the settings that `cache` was made with, if answers shall say what they read.
        fold_at: tokens of the conversation, read in full at every step, beyond which the oldest of
            them are clustered, all but half as many: when a turn has ended, and between two steps
            of a long answer. It needs `asking`; `None` never does so.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    context: FixedContext
    cache: SqueezedCache
    turns: list[Turn] = field(default_factory=list)
    asking: Asking | None = None
    fold_at: int | None = None
    _one_turn: Turns = field(default_factory=Turns, repr=False)
    _asked_by: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_maker(self.model, self.tokenizer, self.context)
        if not self.cache.document.equal(self.context.tokens.cpu()):
            raise SqueezedError("cache: it is of another context; make it with context.cache()")
        if self.fold_at is not None:
            whole("fold_at", self.fold_at, LEAST_FOLDED)
            if self.asking is None:
                raise SqueezedError("fold_at: it needs the settings of the cache; give asking too")

    def ask(self, question: str, **generate_arguments: Any) -> Answer:
        """Answer the next question; spending is counted anew for every turn.

        Arguments and errors are those of `squeezed.generate`.
        """
        self._check(question)
        return self._turn(question, generate_arguments)

    def stream(self, question: str, **generate_arguments: Any) -> Stream:
        """The same in pieces; a turn whose stream was closed never was."""
        self._check(question)
        listener = Listener(self.tokenizer)
        arguments = listener.arguments(generate_arguments)
        return Stream(lambda: self._turn(question, arguments, listener.stopped), listener)

    def _check(self, question: str) -> None:
        check_text("question", question)
        check_maker(self.model, self.tokenizer, self.context)

    def _turn(self, question: str, arguments: dict[str, Any], left: Event | None = None) -> Answer:
        with self._alone():
            answer = self._request(question, arguments).run()
            ends = Wishes(self.model, arguments).end_tokens
            if left is None or not left.is_set():
                self.turns.append(Turn(question, self._spoken(answer.sequences[0], ends)))
                self._fold()
        return answer

    def _fold(self) -> None:
        """Cluster the oldest tokens of the conversation if it holds more than `fold_at`."""
        held = int(self.cache.layers[-1].suffix_length)
        if self.fold_at is None or self.asking is None or held <= self.fold_at:
            return
        count = min(held - self.fold_at // 2, len(self.cache.known))
        if count >= LEAST_FOLDED // 2:
            self.cache = fold(self.cache, self.context, self.asking, count, GrowthConfig())

    def _folding(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `generate` with a look after every step, where steps come one by one."""
        wishes = Wishes(self.model, arguments)
        assisted = any(wishes.chosen(name) is not None for name in ASSISTED)
        if self.fold_at is None or self.asking is None or assisted:
            return arguments
        given = arguments.get("stopping_criteria")
        criteria = list(given) if isinstance(given, (list, tuple)) else [given] if given else []
        criteria.append(Folding(self.cache, self.context, self.asking, self.fold_at))
        return arguments | {"stopping_criteria": criteria}

    def _behind_folded(self, ids: Tensor) -> Tensor:
        """What of a conversation follows the tokens that are folded. A template that writes those
        anew in another way has all of it read again."""
        folded = self.cache.folded
        if folded is None or self.asking is None:
            return ids
        count = len(folded.tokens)
        if count < len(ids) and ids[:count].equal(folded.tokens):
            return ids[count:]
        self.cache = self.context.cache_for(self.asking)
        return ids

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait for the turns of other threads; one that asks within its own would wait for ever."""
        if self._asked_by == get_ident():
            raise SqueezedError(
                "chat: it was asked while its own answer is made, by a streamer or another function"
                " that generate calls; ask when the answer is there"
            )
        with self._one_turn:
            self._asked_by = get_ident()
            try:
                yield
            finally:
                self._asked_by = None

    def _request(self, question: str, arguments: dict[str, Any]) -> Request:
        ids = conversation_ids(self.tokenizer, self.context.template, self.turns, question)
        ids = self._behind_folded(ids)
        self.cache.restart_spending()
        arguments = self._folding(arguments)
        asked = Request.of(self.model, self.tokenizer, self.cache, ids, arguments)
        if self.asking is None:
            self.cache.watch_queries()
            return asked
        return asked.watching(self.context, self.asking)

    def _spoken(self, tokens: Tensor, ends: set[int]) -> Tensor:
        """Tokens up to the one that ended the turn, if the next turn writes what ends it."""
        places = [place for place, token in enumerate(tokens.tolist()) if token in ends]
        if not places:
            return tokens
        return tokens[: places[0]] if self._is_rewritten(tokens[places[0]]) else tokens

    def _is_rewritten(self, end: Tensor) -> bool:
        template = self.context.template
        if not template.is_chat_of(self.tokenizer):
            return True
        written, _ = turn_template(self.tokenizer, template)
        return written.lstrip().startswith(self.tokenizer.decode(end[None]))


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase, template: PromptTemplate, turns: list[Turn], question: str
) -> Tensor:
    """Ids of all that follows the document when `question` is asked after `turns`, `[S]` int64."""
    if template.is_chat_of(tokenizer):
        return continued_ids(tokenizer, _rendered(tokenizer, template, turns, question))
    parts = [template.question_ids(tokenizer, question)]
    for turn in reversed(turns):
        parts += [turn.answer, template.question_ids(tokenizer, turn.question)]
    return torch.cat(parts[::-1])


def _rendered(
    tokenizer: PreTrainedTokenizerBase, template: PromptTemplate, turns: list[Turn], question: str
) -> str:
    """What the chat template writes after the document; control tokens of others are marked."""
    messages = []
    for turn in turns:
        answer = tokenizer.decode(turn.answer, skip_special_tokens=True)
        answer = template.marked(tokenizer, answer, turn.answer.tolist())
        messages += [
            {"role": "user", "content": template.marked(tokenizer, turn.question)},
            {"role": "assistant", "content": answer},
        ]
    messages.append({"role": "user", "content": template.marked(tokenizer, question)})
    messages[0]["content"] = f"{DOCUMENT}\n\n{messages[0]['content']}"
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, *after = text.split(DOCUMENT)
    if len(after) != 1 or before != PromptTemplate.of(tokenizer).before:
        raise SqueezedError(
            "tokenizer: its chat template changes what stands before the document in later turns; "
            "ask each question by itself, with squeezed.generate"
        )
    return after[0]


def turn_template(tokenizer: PreTrainedTokenizerBase, template: PromptTemplate) -> tuple[str, str]:
    """Text between an answer and the next question, and between that and its answer."""
    if not template.is_chat_of(tokenizer):
        return template.between, template.after
    turns = [
        {"role": "user", "content": "-"},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": QUESTION},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    between, after = text.split(ANSWER)[1].split(QUESTION)
    return between, after
