"""From settings to a server that runs, and to its end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from squeezed.answers.session import Session
from squeezed.errors import SqueezedError
from squeezed.hf.asking import Asking
from squeezed.server.app import create_app
from squeezed.server.connections import patient
from squeezed.server.guard import App
from squeezed.server.local.engine import GIB, Limits, LocalEngine
from squeezed.server.routes.state import Server
from squeezed.server.settings import ServerSettings
from squeezed.system.failures import cause_of, readable_failures

KEEP_ALIVE_SECONDS = 30
SPARE_SECONDS = 5
"""After the grace time, for the last words to answers that did not end in it."""
MOST_CONNECTIONS = 2048
WAITING_CONNECTIONS = 128


class Runner(uvicorn.Server):
    """Uvicorn's server, whose signals let running answers end."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self.app = app
        self.interrupted = False
        self.loop: asyncio.AbstractEventLoop | None = None
        self.ending: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end it in good order, with a status of our own."""
        self.loop = loop = asyncio.get_running_loop()
        signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT)
        try:
            for number in signals:
                loop.add_signal_handler(number, self.leave, number)
        except (NotImplementedError, RuntimeError, ValueError):  # a thread, or Windows
            signals = ()
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def leave(self, number: int = signal.SIGTERM) -> None:
        """Take nothing new; a second signal ends it at once."""
        self.interrupted = self.interrupted or number == signal.SIGINT
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
        server: Server | None = getattr(self.app.state, "squeezed", None)
        if server is not None and self.loop is not None and not server.closing:
            server.closing = server.jobs.closing = True
            self.loop.call_soon_threadsafe(self._end_answers, server)

    def _end_answers(self, server: Server) -> None:
        """Let answers end within the grace time; those that do not are told so."""
        grace = server.settings.grace_seconds
        self.ending = asyncio.create_task(server.engine.close(grace))


def serve(settings: ServerSettings, report: Callable[[str], None]) -> None:
    """Run the local engine's server until a signal ends it.

    Args:
        report: called with a line for every step that takes more than a moment.

    Raises:
        SqueezedError: an address or a directory that cannot be had, or a model that does not load.
        KeyboardInterrupt: Ctrl-C ended it.
    """
    with readable_failures():
        settings.contexts.mkdir(parents=True, exist_ok=True)
    asking = Asking(settings.budget, settings.preset, settings.implementation)
    listening = bound(settings.host, settings.port)
    with listening, Session.of(settings.model, settings.dtype, settings.device, report) as session:
        session.prove(asking)
        app, guarded = create_app(settings, lambda: LocalEngine(session, limits_of(settings)))
        runner = Runner(config_of(guarded, settings), app)
        host, port = listening.getsockname()[:2]
        place = f"[{host}]" if ":" in host else host
        report(f"serving {settings.name} on http://{place}:{port}")
        runner.run(sockets=[listening])
        if runner.interrupted:
            raise KeyboardInterrupt


def limits_of(settings: ServerSettings) -> Limits:
    return Limits(
        rows=settings.rows,
        queue=settings.queue,
        context_memory=int(settings.context_memory * GIB),
        document_tokens=settings.max_document_tokens,
        keep_control_tokens=settings.keep_control_tokens,
    )


def config_of(app: App, settings: ServerSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        lifespan="on",
        http=patient(settings.body_seconds),
        log_config=None,
        server_header=False,
        date_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(settings.grace_seconds) + SPARE_SECONDS,
        limit_concurrency=MOST_CONNECTIONS,
    )


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything is loaded; raises `SqueezedError` if it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host.strip("[]"), port))
        listening.listen(WAITING_CONNECTIONS)
    except OSError as error:
        listening.close()
        raise SqueezedError(
            f"port: {host}:{port} cannot be had ({cause_of(error)}); choose another with --port"
        ) from error
    return listening


def log_to_stderr() -> None:
    """Ours and uvicorn's lines, with times; never a key: headers are not logged."""
    form = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form)
    for name in ("squeezed", "uvicorn", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.INFO)
