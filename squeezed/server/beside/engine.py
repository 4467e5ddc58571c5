"""vLLM as the engine: requests are vLLM's own, contexts are read by its connector."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from functools import partial
from pathlib import Path
from typing import Any

from squeezed.context.record import ContextRecord
from squeezed.errors import ContextFileError, SqueezedError
from squeezed.hf.identity.vocabulary import tokenizer_fingerprint
from squeezed.server.library.found import Entry
from squeezed.server.library.passages import Passages
from squeezed.server.port import Ask, Ended, Piece, Progress, TokenSaid
from squeezed.server.refusals import Refusal
from squeezed.vllm.cutting import Share, bytes_on

POLL_SECONDS = 0.2


class VllmEngine:
    """See `squeezed.server.port.Engine`; `client` is vLLM's `EngineClient`."""

    def __init__(self, client: Any) -> None:
        self.client, self.tokenizer = client, client.get_tokenizer()
        self.positions: int | None = client.vllm_config.model_config.max_model_len
        self.is_pinned: Callable[[str], bool] = lambda name: False
        self.cut: Callable[[Entry], Passages] = partial(Passages.of_entry, self.tokenizer)
        self.fingerprint = tokenizer_fingerprint(self.tokenizer)

    async def answer(self, ask: Ask) -> AsyncGenerator[Piece | Ended, None]:
        if ask.passages:
            raise Refusal(400, "squeezed: passages are told by the local engine alone", "squeezed")
        document = [] if ask.entry is None else ask.entry.tokens.tolist()
        ids = document + ask.ids.tolist()
        room = None if self.positions is None else self.positions - ask.sampling.max_tokens
        if room is not None and len(ids) > room:
            raise Refusal(
                400,
                f"max_tokens: {len(ids):,} tokens of prompt and {ask.sampling.max_tokens:,} of "
                f"answer pass the {self.positions:,} that this server takes; ask for fewer",
                "max_tokens",
                "context_length_exceeded",
            )
        answered, reason, said, offset = 0, None, None, 0
        outputs = self.client.generate({"prompt_token_ids": ids}, sampling_of(ask), ask.id)
        try:
            async for output in outputs:
                own = output.outputs[0]
                answered += len(own.token_ids)
                said, reason = output.kv_transfer_params or said, own.finish_reason or reason
                tokens = told(own, offset)
                offset += len(own.text)
                if own.text or tokens:
                    yield Piece(own.text, tokens)
        finally:
            await outputs.aclose()
        report = report_of(said, ask)
        held = len(document) if report["context"] else 0
        yield Ended(reason or "stop", held, len(ids) - held, answered, report)

    async def index(self, text: str, path: Path, progress: Progress) -> None:
        """Made by requests of document and probe; see `squeezed.vllm.endpoint`."""
        from squeezed.vllm import endpoint

        asked = await asyncio.to_thread(endpoint.asked_of, self.client, path.name, text)
        asked.check(self.positions or 1 << 62)
        order = await asyncio.to_thread(endpoint.order_in, self.client.vllm_config, asked)
        progress("prefill", 0, 1)
        if not (await self.client.collective_rpc("squeezed_resume", args=(order,)))[0]:
            why = await endpoint.read(self.client, asked)
            if why is not None:
                raise SqueezedError(f"text: {why}")
        progress("prefill", 1, 1)
        name = path.name.removesuffix(".sqz")
        while True:
            state = (await self.client.collective_rpc("squeezed_indexing", args=(name,)))[0]
            if state is None or state["state"] == "failed":
                raise SqueezedError((state or {}).get("why", "text: the engine forgot it"))
            if state["state"] == "saved":
                return
            progress("cluster", 0, 1)
            await asyncio.sleep(POLL_SECONDS)

    async def append(self, text: str, path: Path, progress: Progress) -> None:
        raise SqueezedError(
            "append: under vLLM a context does not grow; append with squeezed append, and the new "
            "version is found"
        )

    def measured(self, record: ContextRecord) -> int:
        tokens, whole = len(record.tokens), Share()
        return sum(bytes_on(outline, tokens, whole) for outline in record.outlines)

    def check(self, record: ContextRecord) -> None:
        if record.tokenizer != self.fingerprint:
            raise ContextFileError("it was made with another tokenizer")

    def resident(self) -> set[str]:
        return set()  # the ranks know, and `/metrics` counts them

    def forget(self, name: str) -> None:
        pass  # the connector looks into the directory itself

    def numbers(self) -> dict[str, float]:
        return {}  # vLLM's own metrics have them

    async def close(self, grace: float) -> None:
        pass  # vLLM ends its engine


def sampling_of(ask: Ask) -> Any:
    """A request as vLLM's `SamplingParams`, with what our connector reads of it."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    own = ask.sampling
    arguments = {
        "squeezed_context": "none" if ask.entry is None else ask.entry.name,
        "squeezed_budget": ask.asking.budget,
        "squeezed_preset": ask.asking.preset,
    }
    return SamplingParams(
        temperature=own.temperature,
        top_p=own.top_p,
        seed=own.seed,
        max_tokens=own.max_tokens,
        stop=list(own.stop),
        logprobs=own.logprobs,
        output_kind=RequestOutputKind.DELTA,
        extra_args=arguments,
    )


def told(own: Any, offset: int) -> tuple[TokenSaid, ...]:
    """Tokens of one output, with logarithms of their probabilities if those were asked for."""
    found = []
    for token, known in zip(own.token_ids, own.logprobs or (), strict=False):
        ranked = sorted(known.items(), key=lambda item: item[1].rank)
        top = tuple((t, each.decoded_token or "", each.logprob) for t, each in ranked)
        chosen = known[token]
        found.append(
            TokenSaid(token, chosen.decoded_token or "", offset, chosen.logprob, top[: len(top)])
        )
    return tuple(found)


def report_of(said: dict[str, Any] | None, ask: Ask) -> dict[str, Any]:
    """The `squeezed` object: what the connector said of the request."""
    known = (said or {}).get("squeezed") or {}
    found: dict[str, Any] = {"context": known.get("context"), "matched": None}
    if "fallback" in known:
        return found | {"fallback": known["fallback"]}
    if found["context"] is not None:
        shown = ("budget", "preset", "budget_spent", "keys_read")
        found |= {"matched": ask.matched} | {name: known.get(name) for name in shown}
    return found
