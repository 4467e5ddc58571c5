"""Our routes before vLLM's, in its server (entry point `vllm.endpoint_plugins`).

Contexts, jobs, the page, and those answers that name a context or a budget are ours; all else is
vLLM's. Active where `squeezed serve --engine vllm` started the server.
"""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from typing import Any

from fastapi import FastAPI

from squeezed.server.app import create_app, running
from squeezed.server.beside.engine import VllmEngine
from squeezed.server.guard import App, Guard, Receive, Scope, Send
from squeezed.server.settings import ServerSettings

NAME = "squeezed_server"
ANSWERS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
OWN_FIELDS = ("context", "budget", "preset", "squeezed")
OWN_PATHS = ("/", "/ready", "/v1/contexts", "/v1/jobs")
OWN_PREFIXES = ("/page/", "/v1/contexts/", "/v1/jobs/")


class ServerEndpoint:
    """vLLM's `EndpointPlugin`."""

    name = NAME
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.settings = ServerSettings.of({})
        self.own, _ = create_app(self.settings, _no_engine)
        self.stack = AsyncExitStack()

    def attach_router(self, app: FastAPI) -> None:
        settings = self.settings
        app.add_middleware(Beside, own=self.own)
        app.add_middleware(
            Guard,
            keys=self.own.state.keys,
            host=settings.host,
            max_body_bytes=settings.max_body_bytes,
            body_seconds=settings.body_seconds,
            requests_per_key=settings.requests_per_key,
        )

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        begun = running(self.settings, lambda: VllmEngine(engine_client))
        self.own.state.squeezed = await self.stack.enter_async_context(begun)


class Beside:
    """An application that answers first what is its own."""

    def __init__(self, app: App, own: App) -> None:
        self.app, self.own = app, own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        ours = path in OWN_PATHS or path.startswith(OWN_PREFIXES)
        if path in ANSWERS and scope["method"] == "POST":
            body, receive = await _read(receive)
            ours = asks_for_ours(body)
        await (self.own if ours else self.app)(scope, receive, send)


def asks_for_ours(body: bytes) -> bool:
    """Whether a request for an answer has a field that vLLM does not know."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and any(name in found for name in OWN_FIELDS)


async def _read(receive: Receive) -> tuple[bytes, Receive]:
    """A body, and a `receive` that gives it once more."""
    messages, more = [], True
    while more:
        message = await receive()
        messages.append(message)
        more = message["type"] == "http.request" and message.get("more_body", False)
    waiting = iter(messages)

    async def again() -> Any:
        found = next(waiting, None)
        return await receive() if found is None else found

    return b"".join(message.get("body", b"") for message in messages), again


def _no_engine() -> Any:
    raise AssertionError("vLLM's server gives the engine")
