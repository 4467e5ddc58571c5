"""The workers' side: contexts in this rank's memory, and the rules by which requests read them.

Contexts are loaded in a thread, so that a step never waits for a disk. The scheduler says what is
loaded and what goes (`residency`); a worker decides nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from queue import SimpleQueue
from typing import Any, cast

import torch
from torch import Tensor

from squeezed import attention as ops
from squeezed.attention.interface import Attended, Suffix
from squeezed.context.layers import ClusteredLayer
from squeezed.context.record import ContextRecord
from squeezed.context.rule import SelectionRule
from squeezed.context.storage import directory
from squeezed.errors import ContextFileError, SqueezedError
from squeezed.methods.squeezed import Squeezed, SqueezedLayer
from squeezed.system.failures import cause_of
from squeezed.vllm.catalogue import version_of
from squeezed.vllm.cutting import Share, in_place, without_last
from squeezed.vllm.news import Origin
from squeezed.vllm.rows import BLOCKS, WHOLE

log = logging.getLogger("squeezed")

KEPT_RULES = 32
"""Pairs of preset and budget whose rules a context keeps."""


class HeldContext:
    """A context cut to whole blocks and to this rank's heads, on this rank's device."""

    def __init__(
        self,
        record: ContextRecord,
        dropped: int,
        share: Share,
        device: torch.device,
        implementation: str = "auto",
    ) -> None:
        self.record, self.share, self.implementation = record, share, implementation
        self.layers = []
        for layer in record.layers:  # the next ones are being read meanwhile
            cut = without_last(share.layer(cast(ClusteredLayer, layer)), dropped)
            self.layers.append(in_place(cut, device))
            _let_go(record)
        _let_go(record)
        self.device = device
        self.tokens = self.layers[0].tokens
        self._rules: OrderedDict[tuple[float, str], list[SqueezedLayer]] = OrderedDict()

    @property
    def keys_per_token(self) -> int:
        """Clustered keys of all layers and heads here: what dense attention reads of them."""
        return sum(layer.clustered * layer.kv_heads for layer in self.layers)

    def attend(
        self,
        query: Tensor,
        layer: int,
        rule: SelectionRule,
        suffix: Suffix | None = None,
        valid: Tensor | None = None,
    ) -> Attended:
        """Attention of `[B, Hq, Q, D]` to a layer, and to what follows the context if given."""
        compute = ops.implementation(self.implementation, self.device)
        return compute(query, self.layers[layer], rule, suffix, valid)

    def single_tokens(self, preset: str) -> int:
        """How many of a prompt's last tokens select alone."""
        return self.record.calibration(preset).preset.single_tokens

    def at(self, budget: float, preset: str) -> list[SqueezedLayer]:
        """One attention per layer; the rules of a budget are made once."""
        rule = budget, preset
        if rule not in self._rules:
            self._rules[rule] = self._prepared(budget, preset)
            while len(self._rules) > KEPT_RULES:
                self._rules.popitem(last=False)
        self._rules.move_to_end(rule)
        return self._rules[rule]

    def rule(self, budget: float, preset: str, layer: int, kind: str) -> SelectionRule:
        """How a part of a row (`rows.Row.parts`) reads a layer."""
        one = self.at(1.0 if kind == WHOLE else budget, preset)[layer]
        return one.block if kind == BLOCKS else one.token

    def _prepared(self, budget: float, preset: str) -> list[SqueezedLayer]:
        outlined = replace(self.record, layers=tuple(self.layers))
        method = Squeezed(preset, self.implementation)
        return [
            replace(
                one,
                token=_on(self.device, self.share.rule(one.token)),
                block=_on(self.device, self.share.rule(one.block)),
            )
            for one in method.prepare(outlined, budget)
        ]


def _on(device: torch.device, rule: SelectionRule) -> SelectionRule:
    held: dict[str, Any] = {
        n: t.to(device) for n, t in vars(rule).items() if isinstance(t, torch.Tensor)
    }
    return replace(rule, **held)


def _let_go(record: ContextRecord) -> None:
    """A layer of a saved context that was opened is needed no more."""
    opened = getattr(record.layers, "opened", None)
    if opened is not None:
        opened.clear()


class Arena:
    """The contexts of this rank.

    Args:
        share: its heads.
    """

    def __init__(self, share: Share, device: torch.device, implementation: str = "auto") -> None:
        self.share, self.device, self.implementation = share, device, implementation
        self.held: dict[str, HeldContext] = {}
        self.seconds: dict[str, float] = {}
        self._wanted: SimpleQueue[tuple[str, Origin] | None] = SimpleQueue()
        self._done: SimpleQueue[tuple[str, HeldContext | str]] = SimpleQueue()
        self._on_the_way: set[str] = set()
        self._something = threading.Event()
        self._thread: threading.Thread | None = None
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # copies hold up no kernel
        self._read: torch.cuda.Event | None = None

    def load(self, orders: Iterable[tuple[str, Origin]]) -> None:
        """Begin to load contexts."""
        for key, origin in orders:
            self._on_the_way.add(key)
            self._wanted.put((key, origin))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()

    def evict(self, keys: Iterable[str]) -> None:
        """Give memory back; nothing is written there before the kernels that read it are done."""
        for key in keys:
            self.held.pop(key, None)
            self._on_the_way.discard(key)
            if self._stream is not None:
                self._read = torch.cuda.current_stream(self.device).record_event()

    def arrived(self, wait_seconds: float = 0.0) -> tuple[list[str], dict[str, str]]:
        """Keys that were loaded since the last call, and those that could not be, with reasons.

        Waits a little, if asked to, while something is on its way.
        """
        if wait_seconds and self._on_the_way and self._done.empty():
            self._something.wait(wait_seconds)
        self._something.clear()
        loaded, failed = [], {}
        while not self._done.empty():
            key, found = self._done.get()
            if key not in self._on_the_way:
                continue
            self._on_the_way.discard(key)
            if isinstance(found, HeldContext):
                self.held[key] = found
                loaded.append(key)
            else:
                failed[key] = found
        return loaded, failed

    def end(self) -> None:
        if self._thread is not None:
            self._wanted.put(None)

    def _work(self) -> None:
        while (wanted := self._wanted.get()) is not None:
            key, origin = wanted
            self._done.put((key, self._loaded(key, origin)))
            self._something.set()

    def _loaded(self, key: str, origin: Origin) -> HeldContext | str:
        started = time.perf_counter()
        try:
            found = self._on_device(origin)
        except SqueezedError as error:
            return str(error)
        except Exception as error:  # whatever it is, requests run dense and say so
            log.exception("contexts: %s could not be loaded", key)
            return f"{origin.path}: could not be loaded ({cause_of(error)})"
        self.seconds[key] = time.perf_counter() - started
        log.info("contexts: %s loaded in %.1f s", key, self.seconds[key])
        return found

    def _on_device(self, origin: Origin) -> HeldContext:
        on_own_stream = torch.cuda.stream(self._stream) if self._stream else nullcontext()
        with torch.no_grad(), on_own_stream:
            if self._read is not None and self._stream is not None:
                self._stream.wait_event(self._read)
            record = directory.load(origin.path)
            found = HeldContext(
                record, origin.dropped, self.share, self.device, self.implementation
            )
            if self._stream is not None:
                self._stream.synchronize()
        if version_of(origin.path) != origin.version:
            raise ContextFileError(f"{origin.path}: was replaced while it was loaded; ask again")
        return found
