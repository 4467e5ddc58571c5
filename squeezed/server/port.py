"""What the routes ask of an engine, whichever runs the model."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from squeezed.context.record import ContextRecord
    from squeezed.hf.asking import Asking
    from squeezed.server.library.found import Entry
    from squeezed.server.library.passages import Passages

Progress = Callable[[str, int, int], None]
"""Called with a phase, steps done and steps in all; raises to end the work."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when an answer ends.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: share of the probability that may be drawn from.
        seed: of this request's own draws; `None` for any.
        max_tokens: longest answer.
        stop: texts before which an answer ends.
        logprobs: how many of the likeliest tokens are told beside each; `None` tells nothing.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class Ask:
    """One request for an answer.

    Attributes:
        entry: the context before it, or `None`.
        matched: how that was found: `name` or `prefix`.
        ids: `[S]` int64, what follows the document.
        asking: budget, preset and implementation.
        passages: tell how the answer's attention lay over the document's passages.
        per_token: tell it for every token as well.
    """

    id: str
    entry: Entry | None
    ids: Tensor
    sampling: Sampling
    asking: Asking
    passages: bool = False
    per_token: bool = False
    matched: str | None = None


@dataclass(frozen=True)
class TokenSaid:
    """A token of an answer: its id, text, where that begins in the answer, the logarithm of its
    probability, and the likeliest ones with theirs."""

    id: int
    text: str
    offset: int = 0
    logprob: float | None = None
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """Text that will not change any more, and the tokens that were said since the last piece."""

    text: str
    tokens: tuple[TokenSaid, ...] = ()


@dataclass(frozen=True)
class Ended:
    """How an answer ended.

    Attributes:
        reason: `stop` or `length`.
        document_tokens, own_tokens: of the prompt, those of the context and those behind it.
        answer_tokens: those that were generated, the one that ended it included.
        report: the `squeezed` object of the answer.
    """

    reason: str
    document_tokens: int
    own_tokens: int
    answer_tokens: int
    report: dict[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """A model that answers over saved contexts."""

    tokenizer: PreTrainedTokenizerBase
    positions: int | None
    """Tokens of prompt and answer that the model can tell apart, if that has an end."""
    is_pinned: Callable[[str], bool]
    """Whether a context stays in memory once it is there, by its name; the library says so."""
    cut: Callable[[Entry], Passages]
    """A context's text in passages; the library keeps the last ones."""

    def answer(self, ask: Ask) -> AsyncGenerator[Piece | Ended, None]:
        """Pieces, then how it ended. Raises `Refusal`; whoever closes it frees its place."""
        ...

    async def index(self, text: str, path: Path, progress: Progress) -> None:
        """Make a context of `text` and save it at `path`."""
        ...

    async def append(self, text: str, path: Path, progress: Progress) -> None:
        """Put a text behind that of the context at `path`; who reads the old one goes on."""
        ...

    def measured(self, record: ContextRecord) -> int:
        """Bytes that a context takes in the engine's memory."""
        ...

    def check(self, record: ContextRecord) -> None:
        """Raise `SqueezedError` for a context that this engine cannot use."""
        ...

    def resident(self) -> set[str]:
        """Names of the contexts in memory."""
        ...

    def forget(self, name: str) -> None:
        """Let go of a context that was removed or renamed; its readers go on."""
        ...

    def numbers(self) -> dict[str, float]:
        """What metrics show: answers waiting and running, bytes resident and at most."""
        ...

    async def close(self, grace: float) -> None:
        """Take nothing new, let running answers end within `grace` seconds, then stop."""
        ...
