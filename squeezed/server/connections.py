"""Connections that do not wait for ever: for a client to say what it wants, or to take its answer.

Uvicorn itself waits without end for the head of a first request, and for the reader of an answer.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

Base: Any = AutoHTTPProtocol


class Connection(Base):
    """Uvicorn's protocol with an end to its patience.

    Attributes:
        seconds: longest time for the head of a request to come, and for a client to take what
            waits to be sent to it; after that it is hung up on, which frees its place.
    """

    seconds = 60.0

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._head: asyncio.TimerHandle | None = None
        self._taking: asyncio.TimerHandle | None = None
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._taking = self._taking or self._later(self._hang_up)

    def resume_writing(self) -> None:
        self._stop("_taking")
        super().resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        self._stop("_head")
        self._stop("_taking")
        super().connection_lost(error)

    def _await_head(self) -> None:
        """Time runs from the first byte until a request has begun."""
        if not self._idle:
            self._stop("_head")
        elif self._head is None and not self.transport.is_closing():
            self._head = self._later(self._no_head)

    @property
    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _no_head(self) -> None:
        self._head = None
        if self._idle:
            self._hang_up()

    def _hang_up(self) -> None:
        self.transport.abort()

    def _later(self, what: Any) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(self.seconds, what)

    def _stop(self, timer: str) -> None:
        running = getattr(self, timer)
        if running is not None:
            running.cancel()
        setattr(self, timer, None)


def patient(seconds: float) -> type[asyncio.Protocol]:
    """`Connection` with a time of its own."""
    return type("PatientConnection", (Connection,), {"seconds": seconds})
