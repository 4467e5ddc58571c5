"""The application: routes, the guard before them, and what runs while it does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles

from squeezed.server.documents.extract import Limits as ParseLimits
from squeezed.server.guard import App, Guard, Keys
from squeezed.server.jobs import Jobs
from squeezed.server.library.library import Library
from squeezed.server.metrics import Metrics
from squeezed.server.port import Engine
from squeezed.server.prompts import Prompts
from squeezed.server.refusals import Refusal
from squeezed.server.routes import answers, contexts, status
from squeezed.server.routes.state import Server, answer_errors
from squeezed.server.settings import ServerSettings

log = logging.getLogger("squeezed")

PAGE = Path(__file__).with_name("page")
ASK_AGAIN = {"Cache-Control": "no-cache"}
EXPIRE_SECONDS = 1.0

MakeEngine = Callable[[], Engine]


def create_app(settings: ServerSettings, make_engine: MakeEngine) -> tuple[FastAPI, App]:
    """The routes, and the same behind their guard, which is what is served.

    Args:
        make_engine: called once, inside the event loop, when the server starts.
    """
    keys = None if settings.api_key_file is None else Keys.of_file(settings.api_key_file)
    metrics = Metrics()

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        async with running(settings, make_engine, metrics) as server:
            app.state.squeezed = server
            yield

    app = FastAPI(
        title="squeezed-attention",
        version=metadata.version("squeezed-attention"),
        docs_url=None,
        redoc_url=None,
        lifespan=life,
    )
    app.state.keys = keys
    answer_errors(app)
    for module in (answers, contexts, status):
        app.include_router(module.router)
    add_page(app)
    guarded = Guard(
        app,
        keys,
        settings.host,
        settings.max_body_bytes,
        settings.body_seconds,
        settings.requests_per_key,
        metrics.error,
    )
    return app, guarded


def add_page(app: FastAPI) -> None:
    """`/` and its files under `/page/`."""

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        index = PAGE / "index.html"
        if not index.is_file():
            raise Refusal(404, "this server was installed without its page; see /v1/contexts")
        return FileResponse(index, headers=ASK_AGAIN)

    if PAGE.is_dir():
        app.mount("/page", PageFiles(directory=PAGE), name="page")


class PageFiles(StaticFiles):
    """Files that a browser asks for again, lest it mix those of two releases."""

    def file_response(self, *given: Any, **named: Any) -> Response:
        answer = super().file_response(*given, **named)
        answer.headers.update(ASK_AGAIN)
        return answer


@asynccontextmanager
async def running(
    settings: ServerSettings, make_engine: MakeEngine, metrics: Metrics | None = None
) -> AsyncIterator[Server]:
    """A server with its jobs and its look at lifetimes, until the end of the block."""
    async with AsyncExitStack() as stack:
        engine = make_engine()
        stack.push_async_callback(engine.close, 0.0)
        library = await asyncio.to_thread(Library, settings.contexts, engine)
        stack.callback(library.end)
        limits = ParseLimits(settings.parse_seconds, settings.parse_memory_mb)
        jobs = Jobs(library, engine, limits, settings.jobs)
        prompts = Prompts(
            engine.tokenizer, library, settings.keep_control_tokens, settings.max_prompt_tokens
        )
        server = Server(settings, engine, library, jobs, prompts, metrics or Metrics())
        stack.callback(server.tokenizing.shutdown, wait=False)
        library.watch()
        tasks = [asyncio.create_task(jobs.work()), asyncio.create_task(_expire(library))]
        stack.push_async_callback(_ended, jobs, tasks)
        yield server


async def _expire(library: Library) -> None:
    while True:
        await asyncio.sleep(EXPIRE_SECONDS)
        with suppress(Refusal, OSError):
            await asyncio.to_thread(library.expire)


async def _ended(jobs: Jobs, tasks: list[asyncio.Task[None]]) -> None:
    """Let the job that runs stop at its next step; the next server begins it again."""
    jobs.closing = True
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
