"""Routes beside vLLM's own (entry point `vllm.endpoint_plugins`).

`GET /v1/squeezed/requests/{id}`: what a request read, by the id that its answer has; streamed
answers say it nowhere else. `GET /v1/contexts`: what is registered, and what is refused and why.
`POST /v1/contexts` with `{"name": ..., "text": ...}`: index a document in this server. `DELETE
/v1/contexts/{name}`: remove a context; who reads it goes on.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import asdict
from typing import Any
from uuid import uuid4

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from squeezed.config import IndexConfig
from squeezed.context.prompt import PromptTemplate
from squeezed.context.text import check_text
from squeezed.errors import SqueezedError, expect
from squeezed.hf.identity.vocabulary import tokenizer_fingerprint
from squeezed.indexing.probe import probe_question
from squeezed.vllm import capture
from squeezed.vllm.capture import checked_name
from squeezed.vllm.settings import Settings

POLL_SECONDS = 0.1


class SqueezedEndpoint:
    """vLLM's `EndpointPlugin`."""

    name = "squeezed"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.get("/v1/squeezed/requests/{request}")(report)
        app.get("/v1/contexts")(contexts)
        app.post("/v1/contexts")(make)
        app.delete("/v1/contexts/{name}")(remove)

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


async def make(http: Request) -> JSONResponse:
    """Index a document: 201 when its context is saved, 400 with the reason where it cannot be."""
    engine, catalogue = http.app.state.squeezed_engine, http.app.state.squeezed_catalogue
    if catalogue is None:
        return _error(501, "this server has no contexts")
    try:
        body = expect("body", await http.json(), dict, "an object with name and text")
        name, text = checked_name(body.get("name")), check_text("text", body.get("text"))
        if not text.strip():
            raise SqueezedError("text: the document is empty; give at least one word")
        sent = await read(engine, name, text)
    except ValueError as error:  # ours, and vLLM's for a prompt that is too long
        return _error(400, str(error))
    if sent is not None:
        return _error(400, sent)
    while True:
        state = (await engine.collective_rpc("squeezed_indexing", args=(name,)))[0]
        if state is None or state["state"] == "failed":
            return _error(400, (state or {}).get("why", "the server forgot this document"))
        if state["state"] == "saved":
            catalogue.look()
            return JSONResponse({"id": name, "object": "context", **state}, status_code=201)
        await asyncio.sleep(POLL_SECONDS)


async def read(engine, name: str, text: str) -> str | None:
    """Let the engine read document and probe; why it refused, or `None`."""
    from vllm import SamplingParams

    tokenizer = engine.get_tokenizer()
    template = PromptTemplate.of(tokenizer)
    document = template.document_ids(tokenizer, text).tolist()
    probe = template.question_ids(
        tokenizer, probe_question(text, IndexConfig().calibration.probe)
    ).tolist()
    order = {
        "name": name,
        "document_tokens": len(document),
        "template": asdict(template),
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    sampling = SamplingParams(
        max_tokens=1, temperature=0, extra_args={capture.ARGUMENT: json.dumps(order)}
    )
    prompt = {"prompt_token_ids": document + probe}
    said = None
    async for output in engine.generate(prompt, sampling, f"index-{name}-{uuid4().hex}"):
        said = output.kv_transfer_params
    return ((said or {}).get("squeezed") or {}).get("fallback")


async def remove(name: str, http: Request) -> JSONResponse:
    """Remove a context's directory; its readers have it in memory."""
    catalogue = http.app.state.squeezed_catalogue
    if catalogue is None:
        return _error(501, "this server has no contexts")
    catalogue.look()
    try:
        path = catalogue.named(name).path
        away = path.with_name(f".removed-{uuid4().hex}")
        path.rename(away)  # in one step: nobody sees half of it
        shutil.rmtree(away)
    except (SqueezedError, OSError) as error:
        return _error(404, str(error))
    catalogue.look()
    return JSONResponse({"id": name, "object": "context", "deleted": True})


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
    from squeezed.vllm.scheduler import catalogue_of

    return catalogue_of(config, settings)


def _error(status: int, message: str) -> JSONResponse:
    body = {"error": {"message": message, "type": "squeezed", "code": status}}
    return JSONResponse(body, status_code=status)
