"""The bodies of requests."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from squeezed.server.library.names import NAME
from squeezed.server.wire.fields import MOST_LOGPROBS, Answering, Generation, Given, Strict

MOST_MESSAGES, MOST_PARTS = 2048, 2048

SECONDS = 100 * 365 * 24 * 3600
"""Longest lifetime of a context."""


class TextPart(Given):
    type: Literal["text"]
    text: str


class Message(Given):
    """One message of a conversation: text alone. An answer of before is taken as it was given."""

    off: ClassVar[dict[str, tuple[Any, ...]]] = {"annotations": ([],), "tool_calls": ([],)}

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=MOST_PARTS)]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatRequest(Generation):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @property
    def longest(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def told_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @field_validator("messages")
    @classmethod
    def _ends_with_a_question(cls, messages: list[Message]) -> list[Message]:
        if messages[-1].role != "user":
            raise ValueError("expected a message of the user as the last one")
        return messages


class CompletionRequest(Generation):
    """`POST /v1/completions`."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @field_validator("prompt")
    @classmethod
    def _one(
        cls, prompt: str | list[int] | list[str] | list[list[int]]
    ) -> str | list[int] | list[str] | list[list[int]]:
        if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
            prompt = prompt[0]
        if isinstance(prompt, list) and any(not isinstance(each, int) for each in prompt):
            raise ValueError("expected one prompt; ask for several in requests of their own")
        if not prompt:
            raise ValueError("expected a text, or at least one token")
        return prompt

    @property
    def longest(self) -> int | None:
        return self.max_tokens

    @property
    def told_logprobs(self) -> int | None:
        return self.logprobs


class SaidPart(Given):
    off: ClassVar[dict[str, tuple[Any, ...]]] = {"annotations": ([],), "logprobs": ([],)}

    type: Literal["input_text", "output_text", "text"]
    text: str


class Said(Given):
    """A message of `/v1/responses`; an answer of before is taken as it was given."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[SaidPart], Field(max_length=MOST_PARTS)]
    type: Literal["message"] = "message"
    id: str | None = None
    status: Literal["completed", "incomplete", "in_progress"] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ResponsesRequest(Answering):
    """`POST /v1/responses`: nothing is stored, so a conversation is sent whole."""

    input: str | Annotated[list[Said], Field(min_length=1, max_length=MOST_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)

    @property
    def longest(self) -> int | None:
        return self.max_output_tokens

    @property
    def said(self) -> list[tuple[str, str]]:
        """Messages: role and text."""
        before = [("system", self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            return [*before, ("user", self.input)]
        return [*before, *((message.role, message.text) for message in self.input)]

    @field_validator("input")
    @classmethod
    def _ends_with_a_question(cls, said: str | list[Said]) -> str | list[Said]:
        if not said or (not isinstance(said, str) and said[-1].role != "user"):
            raise ValueError("expected a text, or a message of the user as the last one")
        return said


class ContextRequest(Given):
    """`POST /v1/contexts`: a document's text. A file is sent as a form with the same fields."""

    name: str = Field(pattern=NAME)
    text: str
    title: str | None = Field(None, max_length=200)
    ttl: float | None = Field(None, gt=0, le=SECONDS)
    pinned: bool = False


class AppendRequest(Strict):
    """`POST /v1/contexts/{name}/append`: more text. A file is sent as a form."""

    text: str


class ContextChange(Strict):
    """`PATCH /v1/contexts/{name}`: what is given changes; `ttl: null` ends a lifetime."""

    name: str | None = Field(None, pattern=NAME)
    title: str | None = Field(None, max_length=200)
    ttl: float | None = Field(None, gt=0, le=SECONDS)
    pinned: bool | None = None
