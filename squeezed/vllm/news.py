"""What scheduler and workers tell each other with every step."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Order:
    """A document to index.

    Attributes:
        path: where the context is saved.
        prompt: ids of the document, and of the probe after it, or a piece from their beginning.
        document_tokens: how many of them are the document's.
        tokens: of document and probe.
        model: what the context says of its model.
        ranks, layers, kv_heads, dtype: of the engine.
        finish: whether the engine makes the context; or only captures, and another process does.
        began: when, in seconds since 1970.
    """

    name: str
    path: Path
    prompt: list[int]
    document_tokens: int
    tokens: int
    template: dict[str, Any]
    tokenizer: str
    model: dict[str, Any]
    ranks: int = 1
    layers: int = 0
    kv_heads: int = 0
    dtype: str = ""
    finish: bool = True
    began: float = 0.0

    @property
    def is_piece(self) -> bool:
        """Whether more requests follow."""
        return len(self.prompt) < self.tokens

    @property
    def key(self) -> str:
        """What is alike if the same keys are captured, and shared out alike."""
        said = asdict(self) | {"path": self.path.name, "finish": None, "began": None}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Origin:
    """Where a context lies, which version of it, and how it is cut."""

    path: Path
    version: str
    dropped: int


@dataclass(frozen=True)
class Reader:
    """A request over a context, as workers know it.

    Attributes:
        key: of the context.
        document_tokens: of the whole document: its last tokens fill no block, so the request reads
            them itself, and in full, as when the document was indexed.
        prompt_tokens: its last tokens select alone, wherever chunks of the prompt end.
    """

    key: str
    name: str
    budget: float
    preset: str
    document_tokens: int
    prompt_tokens: int

    @property
    def rule(self) -> tuple[str, float, str]:
        """What requests have in common that one call can answer."""
        return self.key, self.budget, self.preset


@dataclass
class StepNews:
    """From the scheduler, before a step.

    Attributes:
        evict, load: contexts, in this order.
        readers: requests that begin to read a context, by id.
        fallbacks: requests that do not, though one was asked for, with the reason.
        orders: requests whose document is to be indexed.
        finished: requests that are over.
        tails: block of a request's last token in this step -> its id; for runners that do not say
            which row is which request.
    """

    evict: list[str] = field(default_factory=list)
    load: dict[str, Origin] = field(default_factory=dict)
    readers: dict[str, Reader] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)
    orders: dict[str, Order] = field(default_factory=dict)
    finished: list[str] = field(default_factory=list)
    tails: dict[int, str] = field(default_factory=dict)


@dataclass
class WorkerNews:
    """From one worker or, added up, from all of them, after a step.

    Attributes:
        spent: request -> `(keys read, keys that dense attention reads)` so far.
        loaded: key -> number of ranks that have it since this step.
        failed: key -> why a rank could not load it.
        seconds: key -> how long the slowest rank took.
    """

    spent: dict[str, tuple[int, int]] = field(default_factory=dict)
    loaded: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.spent or self.loaded or self.failed)

    def add(self, other: WorkerNews) -> WorkerNews:
        """Both together: counts of ranks are added, and so are their heads' keys."""
        spent = dict(self.spent)
        for request, (read, available) in other.spent.items():
            before = spent.get(request, (0, 0))
            spent[request] = before[0] + read, before[1] + available
        loaded = dict(self.loaded)
        for key, ranks in other.loaded.items():
            loaded[key] = loaded.get(key, 0) + ranks
        longest = {
            key: max(self.seconds.get(key, 0.0), other.seconds.get(key, 0.0))
            for key in self.seconds.keys() | other.seconds.keys()
        }
        return WorkerNews(spent, loaded, self.failed | other.failed, longest)
