"""What scheduler and workers tell each other with every step."""

from __future__ import annotations

from dataclasses import dataclass, field

from squeezed.vllm.arena import Origin


@dataclass(frozen=True)
class Reader:
    """A request over a context, as workers know it.

    Attributes:
        key: of the context.
        prompt_tokens: its last tokens select alone, wherever chunks of the prompt end.
    """

    key: str
    name: str
    budget: float
    preset: str
    prompt_tokens: int


@dataclass
class StepNews:
    """From the scheduler, before a step.

    Attributes:
        evict, load: contexts, in this order.
        readers: requests that begin to read a context, by id.
        fallbacks: requests that do not, though one was asked for, with the reason.
        finished: requests that are over.
        tails: block of a request's last token in this step -> its id; for runners that do not say
            which row is which request.
    """

    evict: list[str] = field(default_factory=list)
    load: dict[str, Origin] = field(default_factory=dict)
    readers: dict[str, Reader] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)
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
