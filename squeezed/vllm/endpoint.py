"""Routes beside vLLM's own (entry point `vllm.endpoint_plugins`).

`GET /v1/squeezed/requests/{id}`: what a request read, by the id that its answer has; streamed
answers say it nowhere else. `GET /v1/contexts`: what is registered, and what is refused and why.
`POST /v1/contexts` with `{"name": ..., "text": ...}`: index a document in this server. `DELETE
/v1/contexts/{name}`: remove a context; who reads it goes on.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from dataclasses import asdict
from typing import Any
from uuid import uuid4

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from squeezed.context.text import check_text
from squeezed.errors import SqueezedError, expect
from squeezed.vllm.asking import Asked, fallback_in
from squeezed.vllm.capture import ARGUMENT, checked_name, order_of
from squeezed.vllm.engine import catalogue_of, engine_of, place_of
from squeezed.vllm.pace import Pace
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
    """Index a document: 201 when its context is saved, 400 with the reason where it cannot be.

    What was read before, by a request that lost its connection or a server that ended, is not read
    again.
    """
    state = http.app.state
    engine, catalogue = state.squeezed_engine, state.squeezed_catalogue
    if catalogue is None:
        return _error(501, "this server has no contexts")
    if engine.vllm_config.parallel_config.data_parallel_size > 1:
        return _error(
            400,
            "data_parallel_size: the pieces of a document would go to different replicas; use "
            "squeezed vllm index, or separate servers over one directory",
        )
    try:
        body = expect("body", await http.json(), dict, "an object with name and text")
        name, text = checked_name(body.get("name")), check_text("text", body.get("text"))
        asked = await asyncio.to_thread(asked_of, engine, f"{name}.sqz", text)
        asked.check(engine.vllm_config.model_config.max_model_len)
        order = await asyncio.to_thread(order_in, engine.vllm_config, asked)
        if not (await engine.collective_rpc("squeezed_resume", args=(order,)))[0]:
            why = await read(engine, asked)
            if why is not None:
                return _error(400, why)
    except ValueError as error:  # ours, and vLLM's for a prompt that is too long
        return _error(400, str(error))
    while True:
        found = (await engine.collective_rpc("squeezed_indexing", args=(name,)))[0]
        if found is None or found["state"] == "failed":
            return _error(400, (found or {}).get("why", "the server forgot this document"))
        if found["state"] == "saved":
            catalogue.look()
            return JSONResponse({"id": name, "object": "context", **found}, status_code=201)
        await asyncio.sleep(POLL_SECONDS)


def asked_of(engine, file: str, text: str) -> Asked:
    """What is asked of the engine for a document."""
    return Asked.of(engine.get_tokenizer(), file, text)


def order_in(config, asked: Asked) -> dict[str, Any]:
    """The order that the engine will make of what is asked, as it travels to the workers."""
    if id(config) not in _engines:
        _engines[id(config)] = config, engine_of(config)
    place = place_of(Settings.of_engine(config))
    order = order_of(asked.argument, asked.prompt, place, _engines[id(config)][1])
    return asdict(order) | {"path": str(order.path)}


_engines: dict[int, tuple[Any, dict[str, Any]]] = {}
"""What orders say of this process's engine: its model's files are looked at once."""


async def read(engine, asked: Asked) -> str | None:
    """Let the engine read document and probe, piece by piece; why it refused, or `None`."""
    config = engine.vllm_config
    salt, done, prompt, argument = uuid4().hex, 0, asked.prompt, asked.argument
    pace = Pace(
        Settings.of_engine(config).index_pause_ms / 1e3,
        config.cache_config.block_size,
        config.scheduler_config.max_num_batched_tokens,
    )
    while piece := pace.next(len(prompt) - done):
        done, started = done + piece, time.perf_counter()
        why = await one_request(engine, argument, prompt[:done], salt)
        if why is not None:
            return why
        pace.took(piece, time.perf_counter() - started)
    return await one_request(engine, argument, prompt, salt)


async def one_request(engine, argument: str, ids: list[int], salt: str) -> str | None:
    from vllm import SamplingParams

    sampling = SamplingParams(
        max_tokens=1, temperature=0, extra_args={ARGUMENT: argument}, detokenize=False
    )
    prompt, said = {"prompt_token_ids": ids, "cache_salt": salt}, None
    async for output in engine.generate(prompt, sampling, f"index-{uuid4().hex}"):
        said = output.kv_transfer_params
    return fallback_in(said)


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
    return catalogue_of(config, settings)


def _error(status: int, message: str) -> JSONResponse:
    body = {"error": {"message": message, "type": "squeezed", "code": status}}
    return JSONResponse(body, status_code=status)
