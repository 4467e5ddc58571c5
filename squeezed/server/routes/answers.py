"""`/v1/chat/completions` and `/v1/completions`, streamed and not."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from uuid import uuid4

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from squeezed.errors import shown
from squeezed.hf.asking import Asking
from squeezed.server.port import Ask, Ended, Piece, TokenSaid
from squeezed.server.prompts import Prompt
from squeezed.server.refusals import Refusal, refusal_of
from squeezed.server.routes.state import Json, Server, log, server_of, while_there
from squeezed.server.wire.fields import Answering, Generation
from squeezed.server.wire.replies import ChatShape, Shape, TextShape, event
from squeezed.server.wire.requests import ChatRequest, CompletionRequest, ResponsesRequest
from squeezed.server.wire.responses import ResponseShape

router = APIRouter()

Said = AsyncGenerator[Piece | Ended, None]

STREAM = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""Proxies must not collect the pieces of an answer."""


@router.post("/v1/chat/completions")
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation; its document is named, or begins the first message."""
    server = server_of(request)
    said = [(message.role, message.text) for message in body.messages]
    prompt = await server.prompted(server.prompts.chat, said, body.context)
    shape = ChatShape(f"chatcmpl-{uuid4().hex}", server.settings.name)
    ask = asked(server, body, prompt, shape.id)
    return await Reply(server, request, ask, shape, body).given()


@router.post("/v1/completions")
async def complete(body: CompletionRequest, request: Request) -> Response:
    """Go on with a text, or with token ids."""
    server = server_of(request)
    prompt = body.prompt if isinstance(body.prompt, str) else [int(t) for t in body.prompt]  # type: ignore[arg-type]
    found = await server.prompted(server.prompts.text, prompt, body.context)
    shape = TextShape(f"cmpl-{uuid4().hex}", server.settings.name)
    ask = asked(server, body, found, shape.id)
    return await Reply(server, request, ask, shape, body).given()


@router.post("/v1/responses")
async def respond(body: ResponsesRequest, request: Request) -> Response:
    """Answer a conversation that is sent whole: nothing is stored here."""
    server = server_of(request)
    prompt = await server.prompted(server.prompts.chat, body.said, body.context)
    shape = ResponseShape(f"resp_{uuid4().hex}", server.settings.name, body)
    ask = asked(server, body, prompt, shape.id)
    return await Reply(server, request, ask, shape, body).given()


def asked(server: Server, body: Answering, prompt: Prompt, id: str) -> Ask:
    """The request as the engine takes it; raises `Refusal` for what passes a limit."""
    settings, longest = server.settings, body.longest
    if server.closing:
        raise Refusal(503, "the server is about to end", None, "closing", 10)
    if body.model != settings.name:
        raise Refusal(
            404, f"model: expected {shown(settings.name)!r}, got {shown(body.model)!r}", "model",
            "model_not_found",
        )  # fmt: skip
    if len(prompt.ids) > settings.max_prompt_tokens:
        raise Refusal(
            400, f"prompt: {len(prompt.ids):,} tokens follow the context, at most "
            f"{settings.max_prompt_tokens:,} may; make a context of the long part, with "
            "POST /v1/contexts", "prompt", "context_length_exceeded",
        )  # fmt: skip
    if longest is not None and longest > settings.max_answer_tokens:
        raise Refusal(
            400, f"max_tokens: expected at most {settings.max_answer_tokens}, got {longest}",
            "max_tokens",
        )  # fmt: skip
    telling = body.squeezed
    if prompt.entry is None and (telling.passages or telling.tokens):
        raise Refusal(400, "squeezed: passages are those of a context; name one with context",
                      "squeezed")  # fmt: skip
    asking = Asking(
        settings.budget if body.budget is None else body.budget,
        body.preset or settings.preset,
        settings.implementation,
    )
    if prompt.entry is not None and asking.preset not in prompt.entry.presets:
        known = ", ".join(prompt.entry.presets)
        raise Refusal(400, f"preset: expected one of {known}, got {shown(asking.preset)!r}",
                      "preset")  # fmt: skip
    if prompt.entry is not None:
        server.library.notes.used(prompt.entry.name)
    return Ask(
        id=id,
        entry=prompt.entry,
        ids=prompt.ids,
        sampling=body.sampling(longest or _fitting(server, prompt)),
        asking=asking,
        passages=telling.passages or telling.tokens,
        per_token=telling.tokens,
        matched=None if prompt.entry is None else "prefix" if body.context is None else "name",
    )


def _fitting(server: Server, prompt: Prompt) -> int:
    """Tokens of an answer whose request does not say: as set, or as many as the model can."""
    most, positions = server.settings.answer_tokens, server.engine.positions
    if positions is None:
        return most
    document = 0 if prompt.entry is None else len(prompt.entry.tokens)
    return max(1, min(most, positions - document - len(prompt.ids) + 1))


@dataclass
class Reply:
    """One request and the shape of its answer."""

    server: Server
    request: Request
    ask: Ask
    shape: Shape
    body: Answering

    @property
    def told(self) -> bool:
        return self.ask.sampling.logprobs is not None

    async def given(self) -> Response:
        with self.server.metrics.asking(self.ask):
            pieces = self._measured()
            try:
                first = await while_there(self.request, anext(pieces))
            except BaseException:
                await pieces.aclose()
                raise
        if self.body.stream:
            return StreamingResponse(
                self._events(first, pieces), media_type="text/event-stream", headers=STREAM
            )
        try:
            return Json(await while_there(self.request, self._gathered(first, pieces)))
        finally:
            await pieces.aclose()

    async def _measured(self) -> Said:
        """The engine's pieces; the metrics look on."""
        watch = self.server.metrics.answering(self.ask)
        pieces = self.server.engine.answer(self.ask)
        try:
            async for piece in pieces:
                watch.saw(piece)
                yield piece
        except BaseException as error:
            watch.failed(error)
            raise
        finally:
            await pieces.aclose()
            watch.end()

    async def _gathered(self, first: Piece | Ended, pieces: Said) -> dict:
        texts, said, ended = [], list[TokenSaid](), None
        async for piece in _again(first, pieces):
            if isinstance(piece, Ended):
                ended = piece
            else:
                texts.append(piece.text)
                said += piece.tokens
        assert ended is not None
        return self.shape.whole("".join(texts), said, ended, self.told)

    async def _events(self, first: Piece | Ended, pieces: Said) -> AsyncGenerator[bytes, None]:
        counted = isinstance(self.body, Generation) and self.body.counts_usage
        texts = []
        try:
            for chunk in self.shape.first():
                yield event(chunk)
            async for piece in _again(first, pieces):
                if isinstance(piece, Piece):
                    texts.append(piece.text)
                    chunks = self.shape.piece(piece.text, piece.tokens, self.told)
                else:
                    chunks = self.shape.last("".join(texts), piece, counted)
                for chunk in chunks:
                    yield event(chunk)
        except Exception as error:
            refusal = refusal_of(error)
            if refusal.code == "fault":
                log.exception("%s failed", self.ask.id)
            yield event(refusal.body())
        finally:
            await pieces.aclose()


async def _again(first: Piece | Ended, rest: Said) -> Said:
    yield first
    async for piece in rest:
        yield piece
