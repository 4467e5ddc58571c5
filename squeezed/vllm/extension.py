"""Methods that every vLLM worker gets (`--worker-extension-cls`), for the endpoint to call."""

from __future__ import annotations

from typing import Any

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
