"""What stands before every route: keys, origins, sizes and times of bodies, headers of answers.

Plain ASGI, so that a body is refused while it is still coming in.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from squeezed.errors import SqueezedError, shown
from squeezed.server.refusals import Refusal
from squeezed.server.settings import is_loopback
from squeezed.system.failures import cause_of

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LONGEST_KEY = 512
OPEN_PATHS = ("/", "/health", "/ready", "/favicon.ico")
"""Need no key: probes of load balancers, and the page, which asks for one."""
OPEN_PREFIX = "/page/"

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Keys:
    """Keys of clients; only their hashes are kept, and compared in constant time."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    @classmethod
    def of_file(cls, path: Path) -> Keys:
        """One key a line; lines that begin with # are none.

        Raises:
            SqueezedError: no such file, or no key in it.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise SqueezedError(
                f"api-key-file: {shown(path)} cannot be read ({cause_of(error)}); name a file with "
                "one key a line"
            ) from error
        keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys or any(len(key) < 16 or len(key) > LONGEST_KEY for key in keys):
            raise SqueezedError(
                f"api-key-file: expected keys of 16 to {LONGEST_KEY} characters in {shown(path)}, "
                "one a line; make one with: openssl rand -hex 32"
            )
        return cls(keys)

    def owner(self, header: bytes) -> str | None:
        """Who sent an `Authorization` header, as a word for counting; `None` if nobody we know."""
        scheme, _, key = header.partition(b" ")
        given = _digest(key.strip()[: LONGEST_KEY + 1].decode("utf-8", "replace"))
        found = None
        for digest in self._digests:  # all of them, whichever it is
            if hmac.compare_digest(digest, given):
                found = digest.hex()[:12]
        return found if scheme.lower() == b"bearer" else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class Guard:
    """An ASGI application before another one."""

    def __init__(
        self,
        app: App,
        keys: Keys | None,
        host: str,
        max_body_bytes: int,
        body_seconds: float,
        requests_per_key: int,
        count_error: Callable[[int], None] = lambda status: None,
    ) -> None:
        self.app, self.keys, self.local = app, keys, is_loopback(host)
        self.max_body_bytes, self.body_seconds = max_body_bytes, body_seconds
        self.requests_per_key, self.count_error = requests_per_key, count_error
        self.working: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if scope["method"] == "HEAD":  # what GET would say; the server leaves the body out
            scope = {**scope, "method": "GET"}
        body = Body(receive, self.max_body_bytes, self.body_seconds)
        answer = Answer(send, body, self.count_error)
        try:
            self._check_origin(headers)
            owner = self._owner(scope, headers)
            body.check_length(headers)
        except Refusal as refusal:
            await answer.refuse(refusal)
            return
        await self._counted(owner, scope, body, answer)

    async def _counted(self, owner: str, scope: Scope, body: Body, answer: Answer) -> None:
        """Let it pass if its key has not too many requests at work.

        Those that only look count for nothing, and without keys the queue's length is the limit.
        """
        if self.keys is None or scope["method"] != "POST":
            await self.app(scope, body.receive, answer.send)
            return
        if self.working[owner] >= self.requests_per_key:
            most = self.requests_per_key
            await answer.refuse(
                Refusal(429, f"this key has {most} requests at work; wait for one", None, "key", 1)
            )
            return
        self.working[owner] += 1
        try:
            await self.app(scope, body.receive, answer.send)
        finally:
            self.working[owner] -= 1
            self.working += Counter()  # forget those at 0

    def _owner(self, scope: Scope, headers: dict[bytes, bytes]) -> str:
        if self.keys is None:
            return "everybody"
        path = scope["path"]
        owner = self.keys.owner(headers.get(b"authorization", b""))
        if owner is None and path not in OPEN_PATHS and not path.startswith(OPEN_PREFIX):
            raise Refusal(401, "expected a known key: Authorization: Bearer KEY", None, "key")
        return owner or "nobody"

    def _check_origin(self, headers: dict[bytes, bytes]) -> None:
        """No page of another site may ask, nor one whose name was bent to this address."""
        host = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1").partition("://")[2] != host:
            raise Refusal(403, "requests from pages of other sites are refused", None, "origin")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self.local and self.keys is None and not is_loopback(name):
            raise Refusal(403, f"this server is called localhost, not {shown(name)}", None, "host")


class Body:
    """A request's body, of which no more is taken than is allowed, in no more time."""

    def __init__(self, receive: Receive, most: int, seconds: float) -> None:
        self._receive, self.most, self.seconds = receive, most, seconds
        self.taken, self.complete = 0, False
        self.refused: Refusal | None = None
        self._until: float | None = None

    def check_length(self, headers: dict[bytes, bytes]) -> None:
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.most:
            raise self._too_large()

    async def receive(self) -> MutableMapping[str, Any]:
        if self.complete:
            return await self._receive()
        message = await self._in_time()
        if message["type"] == "http.request":
            self.taken += len(message.get("body", b""))
            self.complete = not message.get("more_body", False)
            if self.taken > self.most:
                self.refused = self._too_large()
        if self.refused is not None:
            return {"type": "http.disconnect"}
        return message

    async def _in_time(self) -> MutableMapping[str, Any]:
        now = asyncio.get_running_loop().time()
        self._until = self._until or now + self.seconds
        try:
            return await asyncio.wait_for(self._receive(), max(0.01, self._until - now))
        except TimeoutError:
            self.refused = Refusal(408, f"the body did not come within {self.seconds:g} s")
            return {"type": "http.disconnect"}

    def _too_large(self) -> Refusal:
        return Refusal(413, f"the request is larger than {self.most:,} bytes", None, "too_large")


class Answer:
    """What goes back: with our headers, and our refusal in the place of a broken body's answer."""

    def __init__(self, send: Send, body: Body, count_error: Callable[[int], None]) -> None:
        self._send, self.body, self.count_error = send, body, count_error
        self.begun = self.replaced = False

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if self.replaced:
            return
        if self.body.refused is not None and not self.begun:
            await self.refuse(self.body.refused)
            return
        if message["type"] == "http.response.start":
            self.begun = True
            self._count(message["status"])
            own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", []), *own]}
        await self._send(message)

    def _count(self, status: int) -> None:
        if status >= 400:
            self.count_error(status)

    async def refuse(self, refusal: Refusal) -> None:
        self.replaced = True
        self._count(refusal.status)
        content = json.dumps(refusal.body()).encode()
        found = {"content-type": "application/json", "content-length": str(len(content))}
        if not self.body.complete:
            found["connection"] = "close"
        headers = [(k.lower().encode(), v.encode()) for k, v in (found | refusal.headers).items()]
        own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
        await self._send(
            {"type": "http.response.start", "status": refusal.status, "headers": headers + own}
        )
        await self._send({"type": "http.response.body", "body": content})
