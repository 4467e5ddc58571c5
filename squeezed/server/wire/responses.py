"""How answers of `/v1/responses` look, whole and as events."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from uuid import uuid4

from squeezed.server.port import Ended, TokenSaid
from squeezed.server.wire.replies import Chunks, usage
from squeezed.server.wire.requests import ResponsesRequest


@dataclass
class ResponseShape:
    """Objects of `/v1/responses`; nothing is stored."""

    id: str
    model: str
    body: ResponsesRequest
    created: int = field(default_factory=lambda: int(time.time()))
    message: str = field(default_factory=lambda: f"msg_{uuid4().hex}")
    number: count = field(default_factory=count)

    def whole(self, text: str, said: Sequence[TokenSaid], ended: Ended, told: bool) -> dict:
        cut = ended.reason == "length"
        counted = usage(ended)
        return self._response("incomplete" if cut else "completed", [self._message(text, cut)]) | {
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": counted["prompt_tokens"],
                "input_tokens_details": counted["prompt_tokens_details"],
                "output_tokens": counted["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counted["total_tokens"],
            },
            "squeezed": ended.report,
        }

    def first(self) -> Chunks:
        empty = self._response("in_progress", [])
        item = self._message("", False) | {"status": "in_progress", "content": []}
        return [
            self._event("response.created", response=empty),
            self._event("response.in_progress", response=empty),
            self._event("response.output_item.added", output_index=0, item=item),
            self._of_part("response.content_part.added", part=_part("")),
        ]

    def piece(self, text: str, said: Sequence[TokenSaid], told: bool) -> Chunks:
        return [self._of_part("response.output_text.delta", delta=text, logprobs=[])]

    def last(self, text: str, ended: Ended, counted: bool) -> Chunks:
        whole = self.whole(text, (), ended, False)
        return [
            self._of_part("response.output_text.done", text=text, logprobs=[]),
            self._of_part("response.content_part.done", part=_part(text)),
            self._event("response.output_item.done", output_index=0, item=whole["output"][0]),
            self._event(f"response.{whole['status']}", response=whole),
        ]

    def _event(self, kind: str, **more: Any) -> dict[str, Any]:
        return {"type": kind, "sequence_number": next(self.number), **more}

    def _of_part(self, kind: str, **more: Any) -> dict[str, Any]:
        place = {"item_id": self.message, "output_index": 0, "content_index": 0}
        return self._event(kind, **place, **more)

    def _message(self, text: str, cut: bool) -> dict[str, Any]:
        return {
            "type": "message",
            "id": self.message,
            "role": "assistant",
            "status": "incomplete" if cut else "completed",
            "content": [_part(text)],
        }

    def _response(self, status: str, output: list) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": self.model,
            "output": output,
            "error": None,
            "incomplete_details": None,
            "instructions": self.body.instructions,
            "max_output_tokens": self.body.max_output_tokens,
            "temperature": self.body.temperature,
            "top_p": self.body.top_p,
            "metadata": {},
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "truncation": "disabled",
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
