"""A context and what changes in its text -> the next version of the context.

The old version is never touched: whoever reads it finishes on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from squeezed.config import GrowthConfig
from squeezed.context.captured import CapturedLayer, ObservedLayer
from squeezed.context.growth import (
    Change,
    Kind,
    Tree,
    changed_since_calibration,
    history_of,
    trees_of,
)
from squeezed.context.layers import WindowLayer
from squeezed.context.record import ContextRecord, Layer
from squeezed.errors import SqueezedError
from squeezed.hf.asking import Asking
from squeezed.hf.continuing import Continued, read_on
from squeezed.hf.positions import LEAST_PROBE, check_document, positions_end
from squeezed.hf.support import input_device
from squeezed.indexing.calibrate import calibrate
from squeezed.indexing.finite import check_captured
from squeezed.indexing.forest import Forest
from squeezed.indexing.growing import Plan, centre_fits, grow_layer
from squeezed.indexing.probe import probe_question
from squeezed.indexing.threads import each_in_a_thread

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]
Context = TypeVar("Context", bound=ContextRecord)


def silent(phase: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Growing:
    """Who makes a context grow, and how.

    Attributes:
        asking: how the model reads the old tokens while it reads new ones.
        progress: called with `("prefill" | "cluster" | "calibrate", done, total)`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    asking: Asking
    config: GrowthConfig
    progress: Progress

    def grown(
        self,
        context: Context,
        ids: Tensor,
        pieces: tuple[int, ...],
        kind: Kind = "append",
        dropped: int = 0,
    ) -> Context:
        """The context with `ids` `[n]` behind it.

        Args:
            pieces: of the text with them.
            dropped: tokens that were taken off the context before.
        """
        started, old, new = time.perf_counter(), len(context.tokens), len(ids)
        self._check_room(old, new)
        for layer in context.clustered_layers:
            layer.rows.plain()  # others are refused before the model reads
        trees, past = trees_of(context), history_of(context)
        kept = len(whole_trees(trees, new, self.config))
        plan = Plan.of(trees, kept, old, old + new, context.config.clustering)
        due = changed_since_calibration(past) + new + dropped
        anew = due > self.config.calibrate_share * plan.tokens or not trees or not context.observed
        tokens = torch.cat([context.tokens, ids])
        probe = self._probe(context, tokens) if anew else None
        chunk = context.config.prefill_chunk
        seen = read_on(
            self.model,
            context,
            ids,
            probe,
            self.asking,
            chunk,
            lambda done: self.progress("prefill", done, new),
        )
        with torch.autocast(input_device(self.model).type, enabled=False):
            made = self._clustered(context, plan, seen, anew)
            made = replace(made, tokens=tokens, pieces=pieces, trees=plan.trees)
            if anew:
                made = calibrated(made, self.progress)
        clustering = context.config.clustering
        change = Change(
            kind=kind,
            tokens=plan.tokens,
            kept=old,
            dropped=dropped,
            read=new + (0 if probe is None else len(probe)),
            clustered=plan.planted.tokens if plan.planted else 0,
            calibrated=anew,
            centre_fits=all(centre_fits(layer, clustering) for layer in made.clustered_layers),
            seconds=time.perf_counter() - started,
        )
        return replace(made, history=(*past, change))

    def _check_room(self, old: int, new: int) -> None:
        """Raise `SqueezedError` where positions or rotary frequencies end before the new end."""
        check_document(self.model, old + new)
        end = positions_end(self.model, old)
        if end and old + new + LEAST_PROBE > end.tokens:
            raise SqueezedError(
                f"text: {old:,} tokens of the context with {new:,} new ones leave no room for a "
                f"question before {end.tokens:,} ({end.reason}); index the whole text again"
            )

    def _probe(self, context: ContextRecord, tokens: Tensor) -> Tensor:
        text = self.tokenizer.decode(tokens)
        question = probe_question(text, context.config.calibration.probe)
        room = check_document(self.model, len(tokens))
        return context.template.question_ids(self.tokenizer, question)[-room:]

    def _clustered(self, context: Context, plan: Plan, seen: Continued, anew: bool) -> Context:
        """The context with new rows in every layer, and with the probe's queries if it is anew."""
        queries = iter(context.observed if seen.queries is None else seen.queries)
        captured = [
            CapturedLayer(keys, values, None if window else next(queries), 0.0)
            for keys, values, window in zip(seen.keys, seen.values, context.windows, strict=True)
        ]
        check_captured(captured, plan.tokens)

        clustering = context.config.clustering

        def grow(parts: tuple[Layer, CapturedLayer, int | None]) -> Layer:
            layer, new, window = parts
            if isinstance(layer, WindowLayer):
                assert window is not None
                return slid(layer, new.keys, new.values, window, plan.tokens)
            own = new.queries if clustering.query_space else None
            return grow_layer(layer, plan, new.keys, new.values, own, clustering, anew)

        pairs = list(zip(context.layers, captured, context.windows, strict=True))
        on_cpu = seen.keys[0].device.type == "cpu"
        layers = []
        for layer in each_in_a_thread(grow, pairs) if on_cpu else map(grow, pairs):
            layers.append(layer)
            self.progress("cluster", len(layers), len(pairs))
        observed = context.observed if seen.queries is None else tuple(seen.queries)
        return replace(context, layers=tuple(layers), observed=observed)


def calibrated(context: Context, progress: Progress) -> Context:
    """The context with thresholds fitted on its observed queries."""
    layers = context.clustered_layers
    seen = [ObservedLayer(*pair) for pair in zip(layers, context.observed, strict=True)]
    forest, found = Forest.of(seen), {}
    for done, preset in enumerate(context.config.presets):
        settings = preset, context.config.budgets, context.config.calibration
        found[preset.name] = calibrate(forest, *settings)
        progress("calibrate", done + 1, len(context.config.presets))
    return replace(context, calibrations=found)


def whole_trees(trees: Sequence[Tree], new: int, config: GrowthConfig) -> Sequence[Tree]:
    """The trees that stay when `new` tokens come: up to the last one that is large enough, and
    larger than what stands behind it by far."""
    kept, behind = list(trees), new
    while kept:
        least = behind * (1 / config.tail_share - 1)
        if kept[-1].tokens >= max(config.whole_tree, least):
            break
        behind += kept.pop().tokens
    return kept


def slid(layer: WindowLayer, keys: Tensor, values: Tensor, window: int, tokens: int) -> WindowLayer:
    """The last keys and values that a window of so many tokens will see, `[Hkv, n, D]` being new.

    Args:
        tokens: of the document with the new ones.
    """
    keys, values = (
        torch.cat([old, more.to(old.dtype)], 1)[:, -(window - 1) :].clone()
        for old, more in ((layer.keys, keys), (layer.values, values))
    )
    return WindowLayer(keys, values, tokens)
