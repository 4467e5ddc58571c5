"""Methods that every vLLM worker gets (`--worker-extension-cls`), for the endpoint to call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from squeezed.vllm.news import Order
from squeezed.vllm.worker import WORKER


class WorkerExtension:
    """Of a worker; names begin with ours, so that none of vLLM's is hidden."""

    def squeezed_report(self, request: str) -> dict[str, Any] | None:
        """What this rank knows of a request."""
        return WORKER.report(request)

    def squeezed_indexing(self, name: str) -> dict[str, Any] | None:
        """How far this rank is with a context that it makes."""
        job = WORKER.indexed.get(name)
        return None if job is None else job.state

    def squeezed_resume(self, order: dict[str, Any]) -> bool:
        """Whether this rank goes on with a document that was captured before, or is just now."""
        return WORKER.resume(Order(**order | {"path": Path(order["path"])}))
