"""`/v1/models`, `/health`, `/ready` and `/metrics`."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from fastapi.responses import Response

from squeezed.errors import shown
from squeezed.server.refusals import Refusal
from squeezed.server.routes.state import Json, server_of

router = APIRouter()
STARTED = int(time.time())


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The one model of this server."""
    return Json({"object": "list", "data": [_model(server_of(request).settings.name)]})


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> Response:
    own = server_of(request).settings.name
    if name != own:
        raise Refusal(404, f"model: expected {shown(own)!r}, got {shown(name)!r}", "model",
                      "model_not_found")  # fmt: skip
    return Json(_model(own))


@router.get("/health")
async def health() -> Response:
    """Whether the process answers."""
    return Json({"status": "ok"})


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Whether new requests are taken: not while the server ends."""
    server = server_of(request)
    if server.closing:
        raise Refusal(503, "the server is about to end", None, "closing", 10)
    return Json(
        {
            "status": "ready",
            "model": server.settings.name,
            "budget": server.settings.budget,
            "contexts": len(server.library.entries()),
        }
    )


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Counts for Prometheus."""
    server = server_of(request)
    content, kind = server.metrics.text(server)
    return Response(content, media_type=kind)


def _model(name: str) -> dict:
    return {"id": name, "object": "model", "created": STARTED, "owned_by": "squeezed-attention"}
