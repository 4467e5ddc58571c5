"""A server of `squeezed serve`, started for a measurement, and its answers as readers see them."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from squeezed.errors import SqueezedError
from squeezed.measure.served.server import ANSWER_SECONDS, Server, free_port

NAME = "model"


@dataclass
class Seen:
    """One streamed answer.

    Attributes:
        text: all that came.
        times: seconds from the request to each piece.
        ended: the finish reason, or why there is none.
    """

    text: str = ""
    times: list[float] = field(default_factory=list)
    ended: str = ""

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces."""
        return [later - one for one, later in zip(self.times, self.times[1:], strict=False)]


class LocalServer(Server):
    """One server over the contexts of a directory; `given` are further arguments."""

    def __init__(self, model: str, contexts: Path, log: Path, given: Sequence[str] = ()) -> None:
        self.port, self.log = free_port(), open(log, "wb")  # noqa: SIM115, closed by `stop`
        words = [sys.executable, "-m", "squeezed.cli", "serve", "--model", model]
        words += ["--contexts", str(contexts), "--port", str(self.port), "--served-name", NAME]
        self.process = subprocess.Popen(
            [*words, *given], stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def make(self, name: str, text: str) -> float:
        """Have a document indexed, and wait for it: seconds."""
        started = time.monotonic()
        status, job = self.send("POST", "/v1/contexts", {"name": name, "text": text})
        while status in (200, 202) and job["state"] in ("waiting", "running"):
            time.sleep(0.1)
            status, job = self.send("GET", f"/v1/jobs/{job['id']}")
        if status not in (200, 202) or job["state"] != "done":
            raise SqueezedError(f"{name} was not indexed: {job}")
        return time.monotonic() - started

    def read(self, body: dict[str, Any], most: int | None = None) -> Seen:
        """A streamed chat; leaves after `most` pieces."""
        seen, started = Seen(), time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        try:
            whole = json.dumps({"model": NAME, "stream": True} | body)
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", whole, headers)
            answer = connection.getresponse()
            if answer.status != 200:
                seen.ended = f"{answer.status}: {answer.read().decode()}"
                return seen
            for line in answer:
                if not line.startswith(b"data: {"):
                    continue
                _take(json.loads(line[6:]), seen, time.perf_counter() - started)
                if most is not None and len(seen.times) >= most:
                    seen.ended = "left"
                    break
        finally:
            connection.close()
        return seen


def _take(chunk: dict[str, Any], seen: Seen, now: float) -> None:
    if "error" in chunk:
        seen.ended = str(chunk["error"])
        return
    for choice in chunk["choices"]:
        piece = choice["delta"].get("content")
        if piece:
            seen.text += piece
            seen.times.append(now)
        seen.ended = choice["finish_reason"] or seen.ended
