"""`/v1/contexts`: documents as named resources; `/v1/jobs`: those on their way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from squeezed.context.text import check_text
from squeezed.errors import SqueezedError, shown
from squeezed.server.documents.extract import kind_of
from squeezed.server.jobs import APPEND, DONE, ENDED, Job
from squeezed.server.library.names import name_from_file
from squeezed.server.library.notes import Note
from squeezed.server.refusals import Refusal
from squeezed.server.routes.state import Json, Server, server_of
from squeezed.server.wire.replies import event
from squeezed.server.wire.requests import AppendRequest, ContextChange, ContextRequest

router = APIRouter()

FORM_FIELDS = ("name", "title", "ttl", "pinned")
TRUE, FALSE = ("true", "1"), ("false", "0")


@router.get("/v1/contexts")
async def contexts(request: Request) -> Response:
    """All contexts, and the directories that hold none that can be used."""
    library = server_of(request).library
    data = [library.described(entry) for entry in library.entries()]
    return Json({"object": "list", "data": data, "refused": library.refused()})


@router.post(
    "/v1/contexts",
    status_code=202,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": ContextRequest.model_json_schema()},
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["file"],
                        "properties": {
                            "file": {"type": "string", "format": "binary"},
                            "name": {"type": "string"},
                            "title": {"type": "string"},
                            "ttl": {"type": "string"},
                            "pinned": {"type": "string"},
                        },
                    }
                },
            },
        }
    },
)
async def make(request: Request) -> Response:
    """Take a document, as JSON or as a form with a file; 202 with the job that indexes it."""
    server = server_of(request)
    if server.closing:
        raise Refusal(503, "the server is about to end", None, "closing", 10)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        body, data, file = await _of_json(request, ContextRequest)
    elif kind == "multipart/form-data":
        body, data, file = await _of_form(request)
    else:
        raise Refusal(
            415,
            "content-type: expected application/json or multipart/form-data, got "
            f"{shown(kind) or 'none'}",
        )
    note = Note(title=body.title, source=file, ttl=body.ttl, pinned=body.pinned)
    job = await server.jobs.add(body.name, data, file, note)
    return Json(job.public, 202, headers={"Location": f"/v1/jobs/{job.id}"})


@router.post(
    "/v1/contexts/{name}/append",
    status_code=202,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": AppendRequest.model_json_schema()}},
        }
    },
)
async def append(name: str, request: Request) -> Response:
    """Put a text behind that of a context; 202 with the job that reads it. The new version takes
    the old one's place when the job is done, and answers that read the old one go on."""
    server = server_of(request)
    if server.closing:
        raise Refusal(503, "the server is about to end", None, "closing", 10)
    entry = await asyncio.to_thread(server.library.named, name)
    _, data, _ = await _of_json(request, AppendRequest)
    job = await server.jobs.add(entry.name, data, None, Note(), APPEND)
    return Json(job.public, 202, headers={"Location": f"/v1/jobs/{job.id}"})


Body = TypeVar("Body", ContextRequest, AppendRequest)


async def _of_json(request: Request, kind: type[Body]) -> tuple[Body, bytes, None]:
    try:
        body = kind.model_validate_json(await request.body())
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    if not check_text("text", body.text).strip():
        raise SqueezedError("text: the document is empty; give at least one word")
    return body, body.text.encode("utf-8"), None


async def _of_form(request: Request) -> tuple[ContextRequest, bytes, str]:
    async with request.form(max_files=1, max_fields=len(FORM_FIELDS) + 1) as form:
        upload = form.get("file")
        if not isinstance(upload, UploadFile):
            raise Refusal(400, "file: expected a file in the form", "file")
        file = (upload.filename or "document").replace("\\", "/").rpartition("/")[2][:200]
        fields = [(name, value) for name, value in form.multi_items() if name != "file"]
        data = await upload.read()
    body = _of_fields(file, fields)
    kind_of(file, data)
    return body, data, check_text("file", file)


def _of_fields(file: str, fields: list[tuple[str, Any]]) -> ContextRequest:
    """A form's fields as JSON's; the name is the file's, if none is given."""
    given: dict[str, Any] = {"name": name_from_file(file), "text": ""}
    for field, value in fields:
        if field not in FORM_FIELDS or not isinstance(value, str):
            name = shown(field)
            message = f"{name}: this field is not supported here; leave it out"
            raise Refusal(400, message, name, "unsupported_field")
        given[field] = _plain(field, value)
    try:
        return ContextRequest.model_validate(given)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


def _plain(field: str, value: str) -> Any:
    """A field of a form, of which all are texts, as JSON would have it."""
    if field == "ttl":
        try:
            return float(value)
        except ValueError as error:
            raise Refusal(400, f"ttl: expected seconds, got {shown(value)}", "ttl") from error
    if field == "pinned" and value.lower() in (*TRUE, *FALSE):
        return value.lower() in TRUE
    return value


@router.get("/v1/contexts/{name}")
async def context(name: str, request: Request) -> Response:
    """One context."""
    library = server_of(request).library
    return Json(library.described(await asyncio.to_thread(library.named, name)))


@router.get("/v1/contexts/{name}/passages")
async def passages(name: str, request: Request) -> Response:
    """A context's text, and where in it each passage stands, in characters."""
    library = server_of(request).library
    entry = await asyncio.to_thread(library.named, name)
    cut = await asyncio.to_thread(library.passages, entry)
    data = [
        {"index": i, "start": place[0], "end": place[1], "tokens": list(bounds)}
        for i, (place, bounds) in enumerate(zip(cut.places, cut.bounds, strict=True))
    ]
    return Json({"object": "list", "context": entry.name, "text": cut.text, "data": data})


@router.patch("/v1/contexts/{name}")
async def change(name: str, body: ContextChange, request: Request) -> Response:
    """Rename a context, or change its title, lifetime or pinning."""
    server = server_of(request)
    if body.name is not None and "name" in body.model_fields_set:
        _refuse_in_making(server, body.name)
    entry = await asyncio.to_thread(server.library.change, name, body)
    return Json(server.library.described(entry))


@router.delete("/v1/contexts/{name}")
async def remove(name: str, request: Request) -> Response:
    """Remove a context; answers that are being written from it go on."""
    await asyncio.to_thread(server_of(request).library.remove, name)
    return Json({"id": name, "object": "context", "deleted": True})


def _refuse_in_making(server: Server, name: str) -> None:
    if any(j.context == name and j.state not in ENDED for j in server.jobs.jobs.values()):
        raise Refusal(409, f"name: {shown(name)!r} is being made already", "name", "name_taken")


@router.get("/v1/jobs")
async def jobs(request: Request) -> Response:
    """All jobs, the latest first."""
    return Json({"object": "list", "data": [j.public for j in server_of(request).jobs.latest()]})


@router.get("/v1/jobs/{id}")
async def job(id: str, request: Request) -> Response:
    """One job."""
    return Json(server_of(request).jobs.named(id).public)


@router.delete("/v1/jobs/{id}")
async def cancel(id: str, request: Request) -> Response:
    """End a job; one that has ended stays as it is."""
    return Json((await server_of(request).jobs.cancel(id)).public)


@router.get("/v1/jobs/{id}/events")
async def events(id: str, request: Request) -> Response:
    """The job at every change, as server-sent events; the last one is called as it ended."""
    jobs = server_of(request).jobs
    jobs.named(id)

    async def told() -> AsyncIterator[bytes]:
        async for now in jobs.watch(id):
            yield event(now.public, _event_name(now))

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(told(), media_type="text/event-stream", headers=headers)


def _event_name(job: Job) -> str:
    return job.state if job.state in ENDED or job.state == DONE else "progress"
