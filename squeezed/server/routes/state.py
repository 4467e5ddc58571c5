"""What routes share, and how exceptions become answers."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from squeezed.errors import SqueezedError, shown
from squeezed.server.jobs import Jobs
from squeezed.server.library.library import Library
from squeezed.server.metrics import Metrics
from squeezed.server.port import Engine
from squeezed.server.prompts import Prompt, Prompts
from squeezed.server.refusals import Refusal, refusal_of
from squeezed.server.settings import ServerSettings

log = logging.getLogger("squeezed")

Found = TypeVar("Found")

KIND = re.compile(r"str|int|(list|function-[a-z]+|constrained-[a-z]+)(\[.*\])?")
"""What Pydantic calls the kinds that a field may be of."""


@dataclass
class Server:
    """Everything behind the routes of one server."""

    settings: ServerSettings
    engine: Engine
    library: Library
    jobs: Jobs
    prompts: Prompts
    metrics: Metrics
    closing: bool = False
    tokenizing: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(4, "squeezed prompt")
    )

    async def prompted(self, make: Callable[..., Prompt], *given: Any) -> Prompt:
        """A prompt, made in a thread: while a document is tokenized, prompts wait, and nothing
        else does."""
        return await asyncio.get_running_loop().run_in_executor(self.tokenizing, make, *given)


class Json(Response):
    """JSON in ASCII, which nothing that a client sent can break."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False).encode("ascii")


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


def server_of(request: Request) -> Server:
    server: Server = request.app.state.squeezed
    return server


async def while_there(request: Request, work: Awaitable[Found]) -> Found:
    """The result of `work`, which is cancelled if the client leaves first."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft
        return working.result()
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def refused(refusal: Refusal) -> Response:
    return Json(refusal.body(), refusal.status, headers=refusal.headers)


def answer_errors(app: FastAPI) -> None:
    """Let every exception become an object that OpenAI's clients read."""

    @app.exception_handler(Refusal)
    async def on_refusal(request: Request, error: Exception) -> Response:
        return refused(refusal_of(error))

    @app.exception_handler(SqueezedError)
    async def on_ours(request: Request, error: Exception) -> Response:
        return refused(refusal_of(error))

    @app.exception_handler(RequestValidationError)
    async def on_body(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return refused(of_validation(error))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        answer = refused(Refusal(error.status_code, in_words(error, request)))
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(ClientLeft)
    async def on_left(request: Request, error: Exception) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def on_fault(request: Request, error: Exception) -> Response:
        return refused(refusal_of(error))


def in_words(error: HTTPException, request: Request) -> str:
    """What the framework says in two words, with what was expected."""
    if error.status_code == 404:
        return f"there is nothing at {shown(request.url.path)}; /openapi.json lists what there is"
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return f"{shown(request.method)} is not taken here; expected {allowed}"
    return str(error.detail)


def of_validation(error: RequestValidationError) -> Refusal:
    """The first thing that is wrong with a body; of a field that may be of several kinds, what is
    wrong with the kind that was meant: there the fault lies deepest."""
    errors = error.errors()
    first = _field(errors[0])
    found = max((each for each in errors if _field(each)[:1] == first[:1]), key=_depth)
    name = ".".join(map(str, _field(found)))
    if found["type"] == "extra_forbidden":
        message = f"{shown(name)}: this field is not supported here; leave it out"
        return Refusal(400, message, shown(name), "unsupported_field")
    if found["type"] == "json_invalid":
        return Refusal(
            400, "the body is not JSON; send an object with Content-Type: application/json"
        )
    said = found["msg"].removeprefix("Value error, ")
    value = found.get("input")
    plain = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    given = f", got {shown(value)}" if plain and len(str(value)) < 100 else ""
    return Refusal(400, f"{shown(name)}: {said}{given}" if name else said, shown(name) or None)


def _field(found: Any) -> list[Any]:
    """Where a fault lies, without what Pydantic calls the kinds that a field may be of."""
    parts = [part for part in found["loc"] if part not in ("body", "query", "path")]
    return [part for part in parts if not (isinstance(part, str) and KIND.fullmatch(part))]


def _depth(found: Any) -> int:
    return len(_field(found))
