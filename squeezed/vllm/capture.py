"""A context made inside vLLM: a request of document and probe leaves keys, values and queries.

The request is an ordinary one, in chunks beside the others' steps. With its last chunk every layer
hands over the document's keys and values, out of vLLM's blocks, and the probe's queries; clustering
and calibration run in a thread, and the context is saved where the server finds it. Its keys are
those of the engine: of quantised weights too.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squeezed.config import IndexConfig
from squeezed.context.captured import CapturedLayer, handed_over
from squeezed.context.prompt import PromptTemplate
from squeezed.context.record import ContextRecord
from squeezed.context.storage.saving import save
from squeezed.errors import SqueezedError, expect, shown, whole
from squeezed.indexing.build import cluster
from squeezed.indexing.calibrate import calibrate
from squeezed.system.failures import cause_of, explained
from squeezed.vllm.news import Order
from squeezed.vllm.rows import Row

log = logging.getLogger("squeezed")

ARGUMENT = "squeezed_index"
"""Of a request: JSON that says what `Order.of` takes. `POST /v1/contexts` sends such a request."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
COPIES = 2.5
"""Memory that indexing takes at most, in copies of the document's keys and values."""


def order_of(text: Any, prompt: Sequence[int] | None, place: Path | None, model: dict) -> Order:
    """From the argument of a request; raises `SqueezedError` for what makes no sense.

    Args:
        place: the directory of contexts, if there is one.
    """
    try:
        said = json.loads(expect(ARGUMENT, text, str, "JSON"))
        name, template = said["name"], said["template"]
        tokens, tokenizer = said["document_tokens"], said["tokenizer"]
        PromptTemplate(**template)
    except (ValueError, TypeError, KeyError) as error:
        raise SqueezedError(f"{ARGUMENT}: not an order to index ({cause_of(error)})") from error
    if place is None:
        raise SqueezedError(f"{ARGUMENT}: this server has no directory for contexts")
    ids = list(prompt or ())
    if not whole("document_tokens", tokens, 1) < len(ids):
        raise SqueezedError(f"{ARGUMENT}: {tokens} of {len(ids)} tokens leave none to probe with")
    path = place / f"{checked_name(name)}.sqz"
    return Order(path.stem, path, ids, tokens, template, tokenizer, model)


def checked_name(name: Any) -> str:
    """`name` if a context may be called so, else `SqueezedError`."""
    if not NAME.fullmatch(expect("name", name, str, "a name (str)")):
        raise SqueezedError(
            f"name: expected letters, digits, dots and dashes, at most 100, got {shown(repr(name))}"
        )
    return name.removesuffix(".sqz")


@dataclass
class Job:
    """An order on its way through a worker."""

    order: Order
    count: int
    queries: dict[int, list[Tensor]] = field(default_factory=dict)
    layers: dict[int, CapturedLayer] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    state: dict[str, Any] = field(default_factory=lambda: {"state": "reading"})

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
        if row.first == 0:  # also when it begins anew after a preemption
            self.queries[layer] = []
            self.layers.pop(layer, None)
        skipped = max(0, self.order.document_tokens - row.first)
        if skipped < row.new:
            self.queries[layer].append(query[row.start + skipped : row.stop].clone())
        if row.length < len(self.order.prompt) or layer in self.layers:
            return
        keys, values = keys_and_values()
        asked = torch.cat(self.queries.pop(layer)).transpose(0, 1).contiguous()
        self.layers[layer] = CapturedLayer(keys, values, asked, scale)

    @property
    def complete(self) -> bool:
        return len(self.layers) == self.count

    def start(self) -> None:
        """Index and save in a thread."""
        captured = [self.layers.pop(number) for number in sorted(self.layers)]
        threading.Thread(target=self._run, args=(captured,), daemon=True).start()

    def fail(self, why: str) -> None:
        self.state = {"state": "failed", "why": why}
        log.warning("contexts: %s could not be made: %s", self.order.name, why)

    def _run(self, captured: list[CapturedLayer]) -> None:
        try:
            check_room(captured)
            self._index(captured)
        except Exception as error:  # the server goes on
            self.fail(str(explained(error) or f"{type(error).__name__}: {cause_of(error)}"))

    @torch.no_grad()
    def _index(self, captured: list[CapturedLayer]) -> None:
        self.state = {"state": "clustering"}
        order, config, read = self.order, IndexConfig(), time.perf_counter()
        device, stream = captured[0].keys.device, None
        if device.type == "cuda":
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.default_stream(device))
        with torch.cuda.stream(stream):
            layers, forest = cluster(
                handed_over(captured), order.document_tokens, config.clustering
            )
            clustered = time.perf_counter()
            calibrations = {
                preset.name: calibrate(forest, preset, config.budgets, config.calibration)
                for preset in config.presets
            }
            seconds = {
                "prefill": read - self.started,
                "cluster": clustered - read,
                "calibrate": time.perf_counter() - clustered,
            }
            record = ContextRecord(
                tokens=torch.tensor(order.prompt[: order.document_tokens]),
                layers=tuple(layers),
                windows=(None,) * len(layers),
                calibrations=calibrations,
                config=config,
                template=PromptTemplate(**order.template),
                model=order.model,
                tokenizer=order.tokenizer,
                seconds=seconds,
                observed=tuple(seen.queries for seen in forest.layers()),
            )
            save(record, order.path)
        self.state = {"state": "saved", "tokens": order.document_tokens, "seconds": seconds}
        log.info("contexts: %s was made of %d tokens", order.name, order.document_tokens)


def check_room(captured: list[CapturedLayer]) -> None:
    """Raise `SqueezedError` unless a GPU has memory left to cluster these layers."""
    device = captured[0].keys.device
    if device.type != "cuda":
        return
    needed = COPIES * sum(2 * x.keys.numel() * x.keys.element_size() for x in captured)
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if needed > free:
        raise SqueezedError(
            f"indexing needs {needed / 1e9:.1f} GB of the GPU, and {free / 1e9:.1f} GB are left; "
            "lower --gpu-memory-utilization"
        )
