"""The scheduler's side: which request reads which context, how, and what came of it.

Nothing of vLLM is imported here; `connector` passes on what it says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from squeezed.config import check_budget
from squeezed.errors import SqueezedError, expect
from squeezed.vllm.catalogue import Catalogue, Found
from squeezed.vllm.residency import Residency
from squeezed.vllm.settings import Settings

NO_CONTEXT = "none"
SLIDING = (
    "some layers of this model see a sliding window; its contexts are read under Transformers, not "
    "under vLLM, and this request ran dense"
)
PREFIX = "squeezed_"
ARGUMENTS = ("squeezed_context", "squeezed_budget", "squeezed_preset")


@dataclass(frozen=True)
class Asked:
    """What a request says of contexts in `vllm_xargs`; `explicit` if it says anything."""

    context: str | None
    budget: float
    preset: str
    explicit: bool

    @classmethod
    def of(cls, arguments: Mapping[str, Any], settings: Settings) -> Asked:
        """Raises `SqueezedError` for a name or a value that makes no sense."""
        own = {name: value for name, value in arguments.items() if name.startswith(PREFIX)}
        for name in own:
            if name not in ARGUMENTS:
                raise SqueezedError(f"{name}: expected one of {', '.join(ARGUMENTS)}")
        context = own.get("squeezed_context")
        if context is not None:
            expect("squeezed_context", context, str, "a context's name, or 'none'")
        return cls(
            context=context,
            budget=check_budget(own.get("squeezed_budget", settings.budget)),
            preset=expect(
                "squeezed_preset",
                own.get("squeezed_preset", settings.preset),
                str,
                "a preset's name",
            ),
            explicit=bool(own),
        )


@dataclass
class Reading:
    """A request and the context that it reads, or why it reads none.

    Attributes:
        prompt_tokens: length of the prompt; its last tokens select alone.
        why: in one line, if it runs dense though a context was asked for or fits.
        ready: whether the context is there, on all ranks.
        read, available: keys read so far, and keys that dense attention would have read of the
            same clusters.
    """

    request: str
    asked: Asked | None
    found: Found | None = None
    prompt_tokens: int = 0
    why: str | None = None
    ready: bool = False
    read: int = 0
    available: int = 0

    @property
    def rule(self) -> tuple[float, str]:
        return self.asked.budget, self.asked.preset

    @property
    def said(self) -> str:
        """What keys that were computed after the context depend on."""
        return f"{self.found.key} {self.asked.preset} {self.asked.budget!r}"

    def report(self) -> dict[str, Any] | None:
        """What the answer says; nothing if contexts do not concern it."""
        if self.why is not None:
            return {"context": None, "fallback": self.why}
        if self.found is None:
            return None
        spent = self.read / self.available if self.available else None
        return {
            "context": self.found.name,
            "preset": self.asked.preset,
            "budget": self.asked.budget,
            "budget_spent": spent,
            "keys_read": self.read,
        }


@dataclass
class Counts:
    """What happened since the last time that somebody asked."""

    requests: dict[str, int] = field(default_factory=dict)
    keys_read: int = 0
    keys_available: int = 0
    loads: int = 0
    failed_loads: int = 0
    evictions: int = 0

    def request(self, kind: str) -> None:
        self.requests[kind] = self.requests.get(kind, 0) + 1


class Serving:
    """Requests over contexts, from their arrival to their end."""

    def __init__(self, settings: Settings, catalogue: Catalogue, residency: Residency) -> None:
        self.settings, self.catalogue, self.residency = settings, catalogue, residency
        self.readings: dict[str, Reading] = {}
        self.counts = Counts()

    def arrive(
        self,
        request: str,
        prompt: Sequence[int] | None,
        arguments: Mapping[str, Any],
        impossible: str | None = None,
    ) -> Reading:
        """A new request; `impossible` says why it cannot read a context whatever it asks.

        It reads one if `found` is set. Whether it may begin, `may_begin` says.
        """
        reading = Reading(request, None, prompt_tokens=len(prompt or ()))
        self.readings[request] = reading
        try:
            self._choose(reading, prompt or (), arguments, impossible)
        except SqueezedError as error:
            reading.why = str(error)
        kind = "context" if reading.found else "fallback" if reading.why else "dense"
        self.counts.request(kind)
        return reading

    def may_begin(self, reading: Reading) -> bool:
        """Whether the context of a request is there; else it is on its way: ask again later.

        A context that turns out not to be had is given up: `why` says the reason.
        """
        if reading.found is None:
            return True
        entry = reading.found
        try:
            reading.ready = self.residency.read(entry.key, entry, entry.bytes, reading.request)
        except SqueezedError as error:
            self.give_up(reading, str(error))
        return reading.ready or reading.found is None

    def give_up(self, reading: Reading, why: str) -> None:
        """Let a request run dense that was to read a context."""
        self.residency.ended(reading.found.key, reading.request)
        reading.found, reading.why, reading.ready = None, why, False
        self.counts.request("fallback")

    def end(self, request: str) -> Reading | None:
        """A request is over."""
        reading = self.readings.pop(request, None)
        if reading is not None and reading.found is not None:
            self.residency.ended(reading.found.key, request)
        return reading

    def tidy(self) -> None:
        """Let go what was deleted and is not read."""
        entries = list(self.catalogue.contexts.values())
        self.residency.drop_unread({entry.key for entry in entries})

    def _choose(
        self,
        reading: Reading,
        prompt: Sequence[int],
        arguments: Mapping[str, Any],
        impossible: str | None,
    ) -> None:
        asked = reading.asked = Asked.of(arguments, self.settings)
        if asked.context == NO_CONTEXT:
            return
        found = self.catalogue.match(prompt)
        if asked.context is not None:
            found = self.catalogue.named(asked.context)
            if not found.begins(prompt):
                raise SqueezedError(
                    f"squeezed_context: the prompt does not begin with {asked.context!r} and go on "
                    "after it; send the document's tokens, and a question"
                )
        if found is None:
            if asked.explicit:
                raise SqueezedError("no registered context begins this prompt")
            return
        if impossible is not None or found.sliding:
            raise SqueezedError(impossible or SLIDING)
        if asked.preset not in found.presets:
            raise SqueezedError(
                f"squeezed_preset: {found.name} was calibrated for {', '.join(found.presets)}, got "
                f"{asked.preset!r}"
            )
        reading.found = found
