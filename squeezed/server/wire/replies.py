"""How answers look: OpenAI's objects, with `squeezed` beside them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from squeezed.server.port import Ended, TokenSaid

DONE = "[DONE]"

Chunks = list[dict[str, Any] | str]
"""What a stream sends: objects, and the word that ends it."""


class Shape(Protocol):
    """The objects of one route: a whole answer, or a stream's first, further and last ones."""

    id: str

    def whole(self, text: str, said: Sequence[TokenSaid], ended: Ended, told: bool) -> dict: ...

    def first(self) -> Chunks: ...

    def piece(self, text: str, said: Sequence[TokenSaid], told: bool) -> Chunks: ...

    def last(self, text: str, ended: Ended, counted: bool) -> Chunks: ...


def usage(ended: Ended) -> dict[str, Any]:
    """Tokens of prompt and answer; those of the context were cached."""
    prompt = ended.document_tokens + ended.own_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": ended.answer_tokens,
        "total_tokens": prompt + ended.answer_tokens,
        "prompt_tokens_details": {"cached_tokens": ended.document_tokens},
    }


@dataclass
class ChatShape:
    """Objects of `/v1/chat/completions`."""

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, said: Sequence[TokenSaid], ended: Ended, told: bool) -> dict:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self.logprobs(said) if told else None,
            "finish_reason": ended.reason,
        }
        return self._object("chat.completion", [choice]) | {
            "usage": usage(ended),
            "squeezed": ended.report,
        }

    def first(self) -> Chunks:
        return [self._chunk({"role": "assistant", "content": ""})]

    def piece(self, text: str, said: Sequence[TokenSaid], told: bool) -> Chunks:
        return [self._chunk({"content": text}, self.logprobs(said) if told else None)]

    def last(self, text: str, ended: Ended, counted: bool) -> Chunks:
        found = [self._chunk({}, None, ended.reason) | {"squeezed": ended.report}]
        if counted:
            found.append(self._object("chat.completion.chunk", []) | {"usage": usage(ended)})
        return [*found, DONE]

    def logprobs(self, said: Sequence[TokenSaid]) -> dict:
        content = [
            {
                **_entry(token.text, token.logprob),
                "top_logprobs": [_entry(t, p) for _, t, p in token.top],
            }
            for token in said
        ]
        return {"content": content, "refusal": None}

    def _chunk(self, delta: dict, logprobs: Any = None, reason: str | None = None) -> dict:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._object("chat.completion.chunk", [choice])

    def _object(self, kind: str, choices: list) -> dict:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


@dataclass
class TextShape:
    """Objects of `/v1/completions`; chunks and whole answers look alike."""

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, said: Sequence[TokenSaid], ended: Ended, told: bool) -> dict:
        logprobs = self.logprobs(said) if told else None
        return self._object(text, logprobs, ended.reason) | {
            "usage": usage(ended),
            "squeezed": ended.report,
        }

    def first(self) -> Chunks:
        return []

    def piece(self, text: str, said: Sequence[TokenSaid], told: bool) -> Chunks:
        return [self._object(text, self.logprobs(said) if told else None, None)]

    def last(self, text: str, ended: Ended, counted: bool) -> Chunks:
        found = [self._object("", None, ended.reason) | {"squeezed": ended.report}]
        if counted:
            found.append(self._object("", None, None) | {"choices": [], "usage": usage(ended)})
        return [*found, DONE]

    def logprobs(self, said: Sequence[TokenSaid]) -> dict:
        return {
            "tokens": [token.text for token in said],
            "token_logprobs": [token.logprob for token in said],
            "top_logprobs": [{text: p for _, text, p in token.top} for token in said],
            "text_offset": [token.offset for token in said],
        }

    def _object(self, text: str, logprobs: Any, reason: str | None) -> dict:
        choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [choice],
        }


def _entry(text: str, logprob: float | None) -> dict:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}


def event(data: dict[str, Any] | str, name: str | None = None) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, allow_nan=False)
    name = name or (None if isinstance(data, str) else data.get("type"))
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {text}\n\n".encode()
