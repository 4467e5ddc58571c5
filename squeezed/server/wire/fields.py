"""Fields that both kinds of answers share, and those that change nothing while they are off."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from squeezed.server.port import Sampling

OFF: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "store": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "service_tier": ("auto", "default"),
    "text": ({"format": {"type": "text"}},),
    "truncation": ("disabled",),
    "background": (False,),
    "include": ([],),
}
"""Fields of OpenAI's that are not supported, and the values that ask for nothing."""

MOST_STOPS, LONGEST_STOP = 16, 256
MOST_LOGPROBS = 20


class Strict(BaseModel):
    """Refuses what it does not know, and values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class Given(Strict):
    """Takes fields that ask for nothing: null, or a value of `off`; they are left out."""

    off: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_off(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {
            name: value
            for name, value in given.items()
            if value is not None and not _is_off(cls.off.get(name, ()), value)
        }


class StreamOptions(Given):
    """`include_usage`: one more chunk with the usage, before the end."""

    include_usage: bool = False
    include_obfuscation: bool = False

    @field_validator("include_obfuscation")
    @classmethod
    def _plain(cls, value: bool) -> bool:
        if value:
            raise ValueError("nothing is obfuscated here; leave it out")
        return value


class Telling(Strict):
    """What an answer tells besides its text.

    Attributes:
        passages: the share of the answer's attention that every passage of the document got.
        tokens: the same for every token of the answer.
    """

    passages: bool = False
    tokens: bool = False


class Answering(Given):
    """Fields of every request for an answer.

    Attributes:
        context: name of the context that stands before the prompt, or `none`; left out, the longest
            context that begins the prompt is used.
        budget: share of the context's keys that a token reads; 1 is dense.
        squeezed: what the answer tells of its reading.
        user: taken, and used for nothing.
    """

    off: ClassVar[dict[str, tuple[Any, ...]]] = OFF

    model: str = Field(max_length=500)
    stream: bool = False
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    user: str | None = Field(None, max_length=500)
    context: str | None = Field(None, max_length=200)
    budget: float | None = Field(None, gt=0, le=1)
    preset: str | None = Field(None, max_length=50)
    squeezed: Telling = Telling()

    @property
    def longest(self) -> int | None:
        """The longest answer that is asked for."""
        raise NotImplementedError

    @property
    def told_logprobs(self) -> int | None:
        """How many of the likeliest tokens are told beside each; `None` tells nothing."""
        return None

    def sampling(self, longest: int) -> Sampling:
        """How tokens are chosen: greedy, unless the request asks for anything else."""
        draws = self.temperature is None and self.top_p is not None
        return Sampling(
            temperature=1.0 if draws else self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            max_tokens=longest,
            logprobs=self.told_logprobs,
        )


class Generation(Answering):
    """Fields of `/v1/chat/completions` and `/v1/completions` alike."""

    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None

    @model_validator(mode="after")
    def _streamed(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: expected with stream=true alone; leave it out")
        return self

    @field_validator("stop")
    @classmethod
    def _stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        texts = [stop] if isinstance(stop, str) else stop or []
        if len(texts) > MOST_STOPS or any(not 0 < len(text) <= LONGEST_STOP for text in texts):
            raise ValueError(
                f"expected at most {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters"
            )
        return stop

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def counts_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, longest: int) -> Sampling:
        return replace(super().sampling(longest), seed=self.seed, stop=self.stops)


def _is_off(offs: tuple[Any, ...], value: Any) -> bool:
    return any(type(value) is type(off) and value == off for off in _same_kinds(offs, value))


def _same_kinds(offs: tuple[Any, ...], value: Any) -> list[Any]:
    """Numbers that stand for nothing, as whole ones or not."""
    found = list(offs)
    if isinstance(value, float):
        found += [float(off) for off in found if type(off) is int]
    return found
