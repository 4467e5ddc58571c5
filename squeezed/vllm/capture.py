"""A document read inside vLLM: keys and values of its tokens, and the queries of a probe.

Requests are ordinary ones, of pieces that grow until they are document and probe, beside the steps
of others. With the last one every layer hands over the document's keys and values, out of vLLM's
blocks. Each rank writes its heads into files (`parts`), and a process of its own makes the context
of them (`making`). Its keys are those of the engine: of quantised weights too.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squeezed.context.captured import CapturedLayer
from squeezed.context.prompt import PromptTemplate
from squeezed.errors import SqueezedError, expect, shown, whole
from squeezed.system.failures import cause_of, explained
from squeezed.vllm import making
from squeezed.vllm.news import Order
from squeezed.vllm.parts import Parts
from squeezed.vllm.rows import Row

log = logging.getLogger("squeezed")

ARGUMENT = "squeezed_index"
"""Of a request: JSON that says what `order_of` takes. `POST /v1/contexts` sends such requests."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
WAIT_SECONDS = 600.0
"""How long a rank waits for what the others captured."""

POLL_SECONDS = 0.05
CPU = torch.device("cpu")


def order_of(
    text: Any, prompt: Sequence[int] | None, place: Path | None, engine: dict[str, Any]
) -> Order:
    """From the argument of a request; raises `SqueezedError` for what makes no sense.

    Args:
        prompt: of the request: document and probe, or a piece from their beginning.
        place: the directory of contexts, if there is one.
        engine: what `Order` says of it: model, ranks, layers and heads.
    """
    try:
        said = json.loads(expect(ARGUMENT, text, str, "JSON"))
        file, template, finish = said["file"], said["template"], said["finish"]
        tokens, tokenizer = said["document_tokens"], said["tokenizer"]
        began = float(said["began"])
        PromptTemplate(**template)
    except (ValueError, TypeError, KeyError) as error:
        raise SqueezedError(f"{ARGUMENT}: not an order to index ({cause_of(error)})") from error
    if place is None:
        raise SqueezedError(f"{ARGUMENT}: this server has no directory for contexts")
    ids, total = list(prompt or ()), whole("tokens", said.get("tokens"), 2)
    if not whole("document_tokens", tokens, 1) < total or len(ids) > total:
        raise SqueezedError(f"{ARGUMENT}: {tokens} of {total} tokens leave none to probe with")
    path = place / checked_file(file)
    known = engine | {"finish": bool(finish), "began": began}
    return Order(path.stem, path, ids, tokens, total, template, tokenizer, **known)


def checked_name(name: Any) -> str:
    """`name` if a context may be called so, else `SqueezedError`."""
    if not NAME.fullmatch(expect("name", name, str, "a name (str)")):
        raise SqueezedError(
            f"name: expected letters, digits, dots and dashes, at most 100, got {shown(repr(name))}"
        )
    return name.removesuffix(".sqz")


def checked_file(name: Any) -> str:
    """`name` if it is one of a file in a directory, and leads nowhere else."""
    expect("file", name, str, "a name (str)")
    if not name or name[0] == "." or "/" in name or "\0" in name:
        raise SqueezedError(f"file: expected the name of a context, got {shown(repr(name))}")
    return name


@dataclass
class Job:
    """An order on its way through a worker.

    Attributes:
        count: layers of the model.
        rank: whose heads these are; the first makes the context of all ranks' files.
        device: of the rank.
        threads: of the process that makes the context.
    """

    order: Order
    count: int
    rank: int = 0
    device: torch.device = CPU
    threads: int = 1
    queries: dict[int, Tensor] = field(default_factory=dict)
    probed: dict[int, Tensor] = field(default_factory=dict)
    layers: dict[int, CapturedLayer] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=lambda: {"state": "reading"})

    @property
    def complete(self) -> bool:
        """Whether all layers were seen to the end."""
        return len(self.layers) == self.count

    def joins(self, order: Order) -> bool:
        """Whether an order is a later piece of this one."""
        mine = self.order
        return self.state["state"] == "reading" and mine.is_piece and mine.began == order.began

    @property
    def goes_on(self) -> bool:
        return self.state["state"] not in ("saved", "captured", "failed")

    def see(
        self,
        row: Row,
        layer: int,
        query: Tensor,
        scale: float,
        keys_and_values: Callable[[], tuple[Tensor, Tensor]],
    ) -> None:
        """A layer's new tokens `query [T, Hq, D]` of the batch, of which the row's are ours.

        Args:
            keys_and_values: gives the document's, `[Hkv, P, D]` each, when all of it was read.
        """
        if not self.goes_on:
            return
        try:
            self._keep(row, layer, query)
            if row.length >= self.order.tokens and layer not in self.layers:
                self.layers[layer] = self._captured(layer, scale, keys_and_values)
        except Exception as error:  # the step is other requests' too
            self._lost(error)

    def _keep(self, row: Row, layer: int, query: Tensor) -> None:
        """The probe's queries, each at its place: pieces and preemptions may bring some again."""
        first = self.order.document_tokens
        start, stop = max(row.first, first), min(row.length, self.order.tokens)
        if start >= stop:
            return
        probe = self.order.tokens - first
        if layer not in self.queries:
            self.queries[layer] = query.new_empty(probe, *query.shape[1:])
            self.probed[layer] = torch.zeros(probe, dtype=torch.bool)
        offset = row.start - row.first
        self.queries[layer][start - first : stop - first] = query[offset + start : offset + stop]
        self.probed[layer][start - first : stop - first] = True

    def _captured(
        self, layer: int, scale: float, keys_and_values: Callable[[], tuple[Tensor, Tensor]]
    ) -> CapturedLayer:
        if layer not in self.queries or not self.probed.pop(layer).all():
            raise SqueezedError("some of the probe was not computed; index the document again")
        keys, values = keys_and_values()
        asked = self.queries.pop(layer).transpose(0, 1).contiguous()
        return CapturedLayer(keys, values, asked, scale)

    def start(self) -> None:
        """Write what was captured, if it is not written yet, and go on from there, in a thread."""
        self.state = {"state": "writing"}
        threading.Thread(target=self._run, daemon=True).start()

    def fail(self, why: str) -> None:
        if self.state["state"] == "failed":
            return
        self.state = {"state": "failed", "why": why}
        self.layers.clear()
        self.queries.clear()
        log.warning("contexts: %s could not be made: %s", self.order.name, why)

    def _run(self) -> None:
        parts = Parts.of(self.order)
        try:
            if self.complete:
                self._write(parts)
            self.state = self._finished(parts) if self.rank == 0 else {"state": "captured"}
            log.info("contexts: %s is %s", self.order.name, self.state["state"])
        except Exception as error:  # the server goes on
            self._lost(error)

    def _lost(self, error: Exception) -> None:
        """Fail, and let other ranks know that they wait for nothing."""
        self.fail(str(explained(error) or f"{type(error).__name__}: {cause_of(error)}"))
        try:
            Parts.of(self.order).fail(self.rank, self.state["why"])
        except OSError as unwritten:
            log.warning("contexts: %s (%s)", self.order.path.parent, unwritten)

    def _write(self, parts: Parts) -> None:
        seconds = max(0.0, time.time() - self.order.began)
        parts.begin(self.order)
        with _beside(self.device):
            for number in sorted(self.layers):
                parts.put(self.rank, number, self.layers.pop(number))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the process that makes the context needs it
        parts.end(self.rank, self.count, seconds)

    def _finished(self, parts: Parts) -> dict[str, Any]:
        """The state in which this ends, when all ranks have written."""
        end = time.monotonic() + WAIT_SECONDS
        while not parts.is_complete(self.order.ranks):
            why = parts.failure(self.order.ranks)
            if why is not None or time.monotonic() > end:
                raise SqueezedError(why or "a rank did not write what it captured")
            time.sleep(POLL_SECONDS)
        if not self.order.finish:
            return {"state": "captured"}
        self.state = {"state": "clustering"}
        found = making.run(parts, str(self.device), self.threads)
        if found["state"] == "failed":
            raise SqueezedError(found["why"])
        return found


def _beside(device: torch.device) -> AbstractContextManager:
    """Copies off a GPU that hold up no step."""
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))
    return torch.cuda.stream(stream)
