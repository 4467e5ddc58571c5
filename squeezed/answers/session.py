"""A model that answers from any number of open contexts, for any number of threads."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from squeezed import engine
from squeezed.answers.chat import Chat
from squeezed.answers.reading import Traffic, traffic
from squeezed.answers.sources import NEUTRAL_QUESTION, NEUTRAL_TOKENS, Passage, sources
from squeezed.answers.stream import Listener, Stream
from squeezed.config import DEFAULT_BUDGET, FOLD_AT, IndexConfig
from squeezed.context.prompt import PromptTemplate
from squeezed.engine import Progress
from squeezed.errors import SqueezedError, expect
from squeezed.hf.answer import Answer, Request
from squeezed.hf.asking import Asking
from squeezed.hf.fixed_context import FixedContext
from squeezed.hf.loading import load_model
from squeezed.hf.support import input_device
from squeezed.hf.switch import hold_attention
from squeezed.hf.watched import Watched
from squeezed.system.forks import Turns

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class _Open:
    """A context that has a name, and what a neutral question read of it, by settings."""

    context: FixedContext
    neutral: dict[Asking, Watched] = field(default_factory=dict)


class Session(AbstractContextManager):
    """A model with its tokenizer, and the contexts that are open for it, by name.

    The model's attention is switched when the session begins, and comes back exactly as it was when
    it ends: with `close()`, at the end of a `with` block, or when the session is dropped. Until
    then any number of threads may ask, index, open and drop; each gets the answers that it would
    have alone, and a question that fails or is stopped leaves nothing behind. Chats are one
    conversation each: their turns wait for each other.

    Model and tokenizer are looked at again at every question, as by `squeezed.generate`: one that
    was edited meanwhile is refused.

    Attributes:
        model, tokenizer: as given; the model must not be trained or switched meanwhile.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises `SqueezedError` for what is no model or tokenizer of Transformers."""
        engine.check_pair(model, tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self._contexts: dict[str, _Open] = {}
        self._one_change = Turns()
        self._give_back = weakref.finalize(self, hold_attention(model))

    @classmethod
    def of(
        cls,
        name: str | Path,
        dtype: str = "auto",
        device: str = "auto",
        report: Callable[[str], None] = lambda line: None,
    ) -> Session:
        """Load a model and its tokenizer.

        Args:
            name: `demo`, a directory, a `.gguf` file, or a hub name such as `Qwen/Qwen3-0.6B`.
            dtype: `auto`, `bfloat16`, `float16` or `float32`; see `squeezed.hf.loading`.
            device: `auto` (the first GPU, else the CPU), or a torch device.
            report: called with a line for every step that takes more than a moment.

        Raises:
            SqueezedError: no such model, no network, or files that do not load.
        """
        name = str(expect("name", name, (str, PathLike), "a model's name or path"))
        return cls(*load_model(name, dtype, device, report))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the open contexts, in the order in which they were opened."""
        return tuple(self._contexts)

    def context(self, context: str | FixedContext) -> FixedContext:
        """The open context of a name; a context itself is taken as it is.

        Raises:
            SqueezedError: no context of that name is open; the line names those that are.
        """
        self._refuse_closed()
        return context if isinstance(context, FixedContext) else self._named(context).context

    def index(
        self,
        text: str,
        name: str | None = None,
        config: IndexConfig | None = None,
        template: PromptTemplate | None = None,
        progress: Progress = engine.silent,
    ) -> FixedContext:
        """Prefill, cluster and calibrate a document; takes and raises as `squeezed.index`.

        Args:
            name: under which it stays open; with `None` it is the caller's alone.
        """
        self._check_free(name)
        made = engine.index(self.model, self.tokenizer, text, config, template, progress)
        return self._keep(name, made)

    def open(self, path: str | Path, name: str | None = None) -> FixedContext:
        """Open a saved context under a name, by default its directory's without `.sqz`.

        Raises:
            ContextFileError: nothing there, damaged, or made by another model or tokenizer.
            SqueezedError: a context of that name is open.
        """
        self._refuse_closed()
        path = Path(expect("path", path, (str, PathLike), "a saved context's path"))
        name = path.resolve().name.removesuffix(".sqz") if name is None else name
        self._check_free(name)
        opened = engine.load(path, self.model)
        engine.check_tokenizer(self.tokenizer, opened)
        return self._keep(name, opened)

    def append(
        self,
        context: str | FixedContext,
        text: str,
        budget: float = 1.0,
        progress: Progress = engine.silent,
    ) -> FixedContext:
        """A new version of a context with `text` behind it; see `FixedContext.append`.

        A name leads to the new version from then on; questions that are being answered from the old
        one go on to their end.
        """
        pair = self.model, self.tokenizer
        return self._changed(context, lambda old: engine.append(*pair, old, text, budget, progress))

    def update(
        self,
        context: str | FixedContext,
        text: str,
        budget: float = 1.0,
        progress: Progress = engine.silent,
    ) -> FixedContext:
        """A new version of a context, of another text; see `FixedContext.update` and `append`."""
        pair = self.model, self.tokenizer
        return self._changed(context, lambda old: engine.update(*pair, old, text, budget, progress))

    def crop(self, context: str | FixedContext, tokens: int) -> FixedContext:
        """A new version of a context, of its first tokens; see `FixedContext.crop` and `append`."""
        return self._changed(context, lambda old: old.crop(tokens))

    def drop(self, name: str) -> None:
        """Close a context; questions that are being answered from it go on to their end.

        Raises:
            SqueezedError: no context of that name is open.
        """
        with self._one_change:
            self._named(name)
            del self._contexts[name]

    def ask(
        self,
        context: str | FixedContext,
        question: str,
        budget: float = DEFAULT_BUDGET,
        watch: bool = False,
        **arguments: Any,
    ) -> Answer:
        """Answer a question; takes and raises as `squeezed.generate`.

        Args:
            context: the name of an open context, or a context.
            arguments: what an `Asking` holds beside the budget, and arguments of Transformers'
                `generate`.
            watch: keep the answer's queries, `Hq D` numbers per layer and token, for `sources` and
                `traffic`.
        """
        asking, arguments = Asking.among(arguments | {"budget": budget})
        return self._request(context, question, asking, watch, arguments).run()

    def stream(
        self,
        context: str | FixedContext,
        question: str,
        budget: float = DEFAULT_BUDGET,
        watch: bool = False,
        **arguments: Any,
    ) -> Stream:
        """The same in pieces of text, with the whole `Answer` in the stream's `answer`.

        What we refuse is refused here, what Transformers refuses with the first piece, with which
        the work begins. It stops at the next token when the caller closes the stream or leaves the
        loop over it.
        """
        listener = Listener(self.tokenizer)
        asking, arguments = Asking.among(arguments | {"budget": budget})
        arguments = listener.arguments(arguments)
        return Stream(self._request(context, question, asking, watch, arguments).run, listener)

    def chat(
        self,
        context: str | FixedContext,
        budget: float = DEFAULT_BUDGET,
        fold_at: int | None = FOLD_AT,
        **settings: str,
    ) -> Chat:
        """A conversation, whose turns see those before; its answers can be asked for `sources`.

        Args:
            fold_at: tokens of the conversation beyond which its oldest turns are clustered, so that
                a long one does not slow down; `None` reads all of them at every step.
            settings: what an `Asking` holds beside the budget.
        """
        asking = Asking(budget, **settings)
        context = self.context(context)
        pair, cache = (self.model, self.tokenizer), context.cache_for(asking)
        return Chat(*pair, context, cache, asking=asking, fold_at=fold_at)

    def sources(self, answer: Answer, count: int = 3) -> list[Passage]:
        """Passages of the document that an answer drew on more than a neutral answer would.

        Raises:
            SqueezedError: the answer was not watched.
        """
        watched = self._watched(answer)
        neutral = self._neutral(watched)
        return sources(self.tokenizer, watched.record, watched, neutral, count)

    def traffic(self, answer: Answer) -> Traffic:
        """Bytes of the document that each of an answer's tokens read; raises as `sources`."""
        watched = self._watched(answer)
        return traffic(watched.record, watched)

    def prove(self, asking: Asking, config: IndexConfig | None = None) -> None:
        """Raise `SqueezedError` if nothing could be answered so, before a document is read.

        Args:
            config: that the document will be indexed with.
        """
        presets = [preset.name for preset in (config or IndexConfig()).presets]
        dtype = min(self.model.dtype, torch.float32, key=lambda each: each.itemsize)
        asking.prove(presets, input_device(self.model), dtype)

    def close(self) -> None:
        """End the session: contexts are dropped, and the model is given back as it was.

        Questions that other threads ask go on, and the model comes back when the last one ends.
        """
        with self._one_change:
            self._contexts.clear()
        self._give_back()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _request(
        self,
        context: str | FixedContext,
        question: str,
        asking: Asking,
        watch: bool,
        arguments: dict[str, Any],
    ) -> Request:
        pair = self.model, self.tokenizer
        return engine.request(*pair, self.context(context), question, asking, watch, **arguments)

    def _changed(
        self, context: str | FixedContext, change: Callable[[FixedContext], FixedContext]
    ) -> FixedContext:
        """The next version of a context, to which its name leads if it has one."""
        old = self.context(context)
        made = change(old)
        if isinstance(context, str):
            with self._one_change:
                if self._named(context).context is not old:
                    raise SqueezedError(
                        f"context: {context!r} was changed by another thread meanwhile; try again"
                    )
                self._contexts[context] = _Open(made)
        return made

    def _watched(self, answer: Answer) -> Watched:
        self._refuse_closed()
        expect("answer", answer, Answer, "an Answer of this session")
        if answer.watched is None:
            raise SqueezedError("answer: its queries were not kept; ask with watch=True")
        return answer.watched

    def _neutral(self, watched: Watched) -> Watched:
        """A neutral question, asked in the same way; kept for contexts that have a name."""
        entries = (entry for entry in self._entries() if entry.context is watched.record)
        known = next(entries, _Open(watched.record)).neutral
        if watched.asking not in known:
            arguments = {"max_new_tokens": NEUTRAL_TOKENS}
            asked = (NEUTRAL_QUESTION, watched.asking, True, arguments)
            answer = self._request(watched.record, *asked).run()
            known[watched.asking] = self._watched(answer)
        return known[watched.asking]

    def _entries(self) -> list[_Open]:
        with self._one_change:
            return list(self._contexts.values())

    def _named(self, name: str) -> _Open:
        found = self._contexts.get(expect("context", name, str, "a name, or a FixedContext"))
        if found is None:
            there = ", ".join(map(repr, self._contexts)) or "none"
            raise SqueezedError(f"context: {name!r} is not open; open are {there}")
        return found

    def _check_free(self, name: str | None) -> None:
        self._refuse_closed()
        if name is None:
            return
        if not expect("name", name, str, "a name (str)").strip():
            raise SqueezedError(f"name: expected a name that can be seen, got {name!r}")
        if name in self._contexts:
            raise SqueezedError(f"name: {name!r} is open; drop it first, or take another name")

    def _keep(self, name: str | None, context: FixedContext) -> FixedContext:
        if name is not None:
            with self._one_change:
                self._check_free(name)
                self._contexts[name] = _Open(context)
        return context

    def _refuse_closed(self) -> None:
        if not self._give_back.alive:
            raise SqueezedError("session: it is closed; make a new one")
