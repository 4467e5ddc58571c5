"""Routes beside vLLM's own (entry point `vllm.endpoint_plugins`).

`GET /v1/squeezed/requests/{id}`: what a request read, by the id that its answer has; streamed
answers say it nowhere else. `GET /v1/contexts`: what is registered, and what is refused and why.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from squeezed.vllm.settings import Settings


class SqueezedEndpoint:
    """vLLM's `EndpointPlugin`."""

    name = "squeezed"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.get("/v1/squeezed/requests/{request}")(report)
        app.get("/v1/contexts")(contexts)

    async def init_state(self, engine_client, state, args) -> None:
        state.squeezed_engine = engine_client
        state.squeezed_catalogue = _catalogue(engine_client)


async def report(request: str, http: Request) -> JSONResponse:
    """Context, budget asked and spent, and keys read; added up over ranks."""
    engine = http.app.state.squeezed_engine
    try:
        found = await engine.collective_rpc("squeezed_report", args=(request,))
    except Exception:
        return _error(501, "this server was not started by squeezed vllm: no rank can answer")
    known = [one for one in found if one]
    if not known:
        return _error(404, f"no request {request!r} among the last ones; it may have run dense")
    return JSONResponse(joined(known))


async def contexts(http: Request) -> JSONResponse:
    """Contexts that may be named by requests."""
    catalogue = http.app.state.squeezed_catalogue
    if catalogue is None:
        return _error(501, "this server has no contexts")
    catalogue.look()
    data = [
        {"id": entry.name, "object": "context", "tokens": len(entry.tokens), "bytes": entry.bytes}
        for entry in sorted(catalogue.contexts.values(), key=lambda entry: entry.name)
    ]
    refused = [{"id": name, "why": why} for name, why in sorted(catalogue.refused.items())]
    return JSONResponse({"object": "list", "data": data, "refused": refused})


def joined(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One report of all ranks' keys; every rank reads a like share, by its own thresholds."""
    if "keys_read" not in ranks[0]:
        return ranks[0]
    spent = [one["budget_spent"] for one in ranks if one["budget_spent"] is not None]
    return ranks[0] | {
        "keys_read": sum(one["keys_read"] for one in ranks),
        "budget_spent": sum(spent) / len(spent) if spent else None,
    }


def _catalogue(engine_client):
    config = getattr(engine_client, "vllm_config", None)
    settings = Settings.of_engine(config)
    if settings is None:
        return None
    from squeezed.vllm.connector import catalogue_of

    return catalogue_of(config, settings)


def _error(status: int, message: str) -> JSONResponse:
    body = {"error": {"message": message, "type": "squeezed", "code": status}}
    return JSONResponse(body, status_code=status)
