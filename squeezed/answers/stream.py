"""An answer that comes in pieces of text, and stops when nobody listens any more."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from contextvars import copy_context
from queue import SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from squeezed.errors import SqueezedError
from squeezed.hf.answer import Answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"


class Listener:
    """A streamer and a stopping criterion of `generate`: sends the text on, and ends it on wish.

    Attributes:
        said: pieces of text, then the `Answer` or the exception that it ended with.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.said: SimpleQueue[str | Answer | BaseException] = SimpleQueue()
        self.stopped = Event()
        self._tokens: list[int] | None = None
        self._sent = ""

    def arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `generate` by which this listens, besides those that the caller gave."""
        if given.get("streamer") is not None:
            raise SqueezedError("streamer: a stream is one itself; leave it out, or use ask")
        criteria = given.get("stopping_criteria") or []
        criteria = criteria if isinstance(criteria, Iterable) else [criteria]
        return given | {"streamer": self, "stopping_criteria": [*criteria, self._ends]}

    def _ends(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        rows = input_ids.shape[0]
        return torch.full((rows,), self.stopped.is_set(), device=input_ids.device)

    def put(self, value: Tensor) -> None:
        """Take the prompt, then every token; send on what will not change any more."""
        if self._tokens is None:
            self._tokens = []
            return
        self._tokens += value.flatten().tolist()
        text = self.tokenizer.decode(self._tokens, skip_special_tokens=True)
        if not text.endswith(REPLACEMENT):  # half of a character
            self._send(text.strip())  # white space at the end may be the answer's last

    def end(self) -> None:
        pass  # what is left comes with the answer

    def finish(self, ended: Answer | BaseException) -> None:
        """Send what is left of an answer's text, and how it ended."""
        if isinstance(ended, Answer):
            self._send(ended.text)
        self.said.put(ended)

    def _send(self, text: str) -> None:
        if len(text) > len(self._sent) and text.startswith(self._sent):
            self.said.put(text[len(self._sent) :])
            self._sent = text


class Stream(Iterator[str], AbstractContextManager):
    """Pieces of an answer's text, which together are its text.

    The model works in a thread of its own, from the first piece on, and does not wait for who
    listens. It stops at the next token when the stream is closed, or dropped, as by leaving a loop.

    Attributes:
        answer: the whole `Answer`; waits for it.

    Raises:
        SqueezedError: as `squeezed.generate` does, where a piece or the answer is waited for; the
            answer of a stream that was closed.
    """

    def __init__(self, work: Callable[[], Answer], listener: Listener) -> None:
        self._listener = listener
        self._ended: Answer | BaseException | None = None
        call = copy_context().run, _work, work, listener, _autocast()
        self._worker = Thread(target=call[0], args=call[1:], name="squeezed stream", daemon=True)

    def __next__(self) -> str:
        if self._ended is None:
            if self._worker.ident is None:
                self._worker.start()
            said = self._listener.said.get()
            if isinstance(said, str):
                return said
            self._ended = said
            if isinstance(said, BaseException):
                raise said
        raise StopIteration

    @property
    def answer(self) -> Answer:
        deque(self, maxlen=0)
        if isinstance(self._ended, BaseException):
            raise self._ended
        assert self._ended is not None
        return self._ended

    def close(self) -> None:
        """Stop the work, and wait until it has stopped: a token at most."""
        self._listener.stopped.set()
        if self._worker.ident is not None:
            self._worker.join()
        self._ended = self._ended or _closed()

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._listener.stopped.set()


def _work(work: Callable[[], Answer], listener: Listener, autocast: list[torch.autocast]) -> None:
    with ExitStack() as stack:
        for each in autocast:
            stack.enter_context(each)
        try:
            answer = work()
        except BaseException as error:
            listener.finish(error)
        else:
            listener.finish(_closed() if listener.stopped.is_set() else answer)


def _closed() -> SqueezedError:
    return SqueezedError("stream: it was closed before its answer was complete; ask again")


def _autocast() -> list[torch.autocast]:
    """The caller's autocast, which is its thread's own."""
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return [torch.autocast(kind, torch.get_autocast_dtype(kind)) for kind in kinds]
