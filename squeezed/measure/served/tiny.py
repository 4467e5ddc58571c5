"""Thousands of requests that are small or wrong: what they cost the server, and what it says."""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter
from itertools import count
from typing import Any

from squeezed.measure.served.local import LocalServer

TINY = (("GET", "/health", 200), ("GET", "/v1/models", 200), ("GET", "/v1/nothing", 404),
        ("POST", "/v1/chat/completions", 400), ("POST", "/v1/contexts", 415))  # fmt: skip


def tiny(server: LocalServer, requests: int, clients: int) -> dict[str, Any]:
    """Many requests that are small or wrong, over connections that stay open."""
    numbers, statuses, wrong = count(), Counter[str](), list[str]()

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        while (number := next(numbers)) < requests:
            method, path, expected = TINY[number % len(TINY)]
            connection.request(method, path, b"{" if method == "POST" else None)
            answer = connection.getresponse()
            answer.read()
            statuses[str(answer.status)] += 1
            if answer.status != expected:
                wrong.append(f"{method} {path}: {answer.status}")
        connection.close()

    before, started = server.memory_bytes(), time.perf_counter()
    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    return {"requests": sum(statuses.values()), "statuses": dict(statuses), "wrong": wrong[:20],
            "seconds": round(seconds, 1), "memory_before": before,
            "memory_after": server.memory_bytes()}  # fmt: skip
