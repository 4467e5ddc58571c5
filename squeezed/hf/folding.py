"""The oldest tokens behind a context become a clustered part of their own, this cache's alone.

A conversation's own tokens are read in full, so every turn of a long one is slower than the last.
Folded, they are read as the document is: clusters that matter exactly, an average for each of the
others. Nothing of the shared context is copied. Nothing is read again either: keys and values are
those that the cache holds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from squeezed.config import GrowthConfig
from squeezed.context.calibration import Calibration
from squeezed.context.captured import ObservedLayer
from squeezed.context.layers import ClusteredLayer
from squeezed.context.record import ContextRecord
from squeezed.context.rows import Rows
from squeezed.hf.asking import Asking
from squeezed.hf.cache import SqueezedCache
from squeezed.hf.cache_layers import ContextLayer, WindowedLayer
from squeezed.hf.growing import slid, whole_trees
from squeezed.hf.suffix import SuffixLayer
from squeezed.indexing.calibrate import calibrate
from squeezed.indexing.forest import Forest
from squeezed.indexing.growing import Plan, grow_layer
from squeezed.indexing.threads import each_in_a_thread
from squeezed.methods.extended import ExtendedLayer

QUERIES = 256
"""Most of the last queries on which a folded part is calibrated."""


class Folding:
    """A stopping criterion that never stops: it folds a cache between two steps of `generate()`.

    Of a single request; beams and several sequences go on unfolded.
    """

    def __init__(
        self, cache: SqueezedCache, context: ContextRecord, asking: Asking, limit: int
    ) -> None:
        """Folds all but half of `limit` tokens behind the document when there are more."""
        self.cache, self.context, self.asking, self.limit = cache, context, asking, limit

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        held, start = int(self.cache.layers[-1].suffix_length), len(self.cache.document)
        if len(input_ids) == 1 and held > self.limit:
            self.cache.known = input_ids[0, start : start + held].cpu()
            count = held - self.limit // 2
            made = fold(self.cache, self.context, self.asking, count, GrowthConfig())
            self.cache.becomes(made)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def fold(
    cache: SqueezedCache, context: ContextRecord, asking: Asking, count: int, config: GrowthConfig
) -> SqueezedCache:
    """A cache that holds the same tokens, of which the first `count` after the document, and what
    was folded before, are clustered.

    Args:
        cache: made by `context.cache`, or by this; it watched the queries of its last answer.
        asking: the settings that it was made with.
        count: at most as many as the cache knows the ids of.
    """
    device = cache.layers[-1].keys.device.type
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        return _fold(cache, context, asking, count, config)


def _fold(
    cache: SqueezedCache, context: ContextRecord, asking: Asking, count: int, config: GrowthConfig
) -> SqueezedCache:
    record = _folded(cache, context, asking, count, config)
    both = zip(asking.attentions(context), asking.attentions(record), strict=True)
    views = (ExtendedLayer(*pair) for pair in both)
    layers: list[SuffixLayer] = []
    for old, window in zip(cache.layers, context.windows, strict=True):
        if isinstance(old, ContextLayer):
            new: SuffixLayer = ContextLayer(next(views))
        else:
            assert isinstance(old, WindowedLayer) and window is not None
            recent = old.keys[0, :, :count], old.values[0, :, :count]
            new = WindowedLayer(slid(old.context, *recent, window, old.tokens + count))
        layers.append(_with_suffix(new, old, count))
    document = torch.cat([context.tokens.cpu(), record.tokens])
    made = SqueezedCache(layers, cache.budget, document)
    made.known, made.folded = cache.known[count:], record
    return made


def _with_suffix(new: SuffixLayer, old: SuffixLayer, count: int) -> SuffixLayer:
    """A layer that holds what the old one does behind its first `count` tokens."""
    keys, values = (x[:1, :, count:].clone() for x in (old.keys, old.values))
    if isinstance(new, ContextLayer) and isinstance(old, ContextLayer):
        new.continues(old)
    new.lazy_initialization(keys, values)
    new.keys, new.values = keys, values
    return new


def _folded(
    cache: SqueezedCache, context: ContextRecord, asking: Asking, count: int, config: GrowthConfig
) -> ContextRecord:
    """All that is folded now, as a context of its own with the layers of full attention."""
    clustering = replace(context.config.clustering, pinned_first=0, pinned_last=0)
    before, views = cache.folded, cache.context_layers
    trees = () if before is None else before.trees
    held = 0 if before is None else len(before.tokens)
    kept = len(whole_trees(trees, count, config))
    plan = Plan.of(trees, kept, held, held + count, clustering)
    queries = [_last_queries(view) for view in views]

    def grow(place: int) -> ClusteredLayer:
        view = views[place]
        old = _nothing(view.context.layer) if before is None else before.clustered_layers[place]
        new = view.keys[0, :, :count], view.values[0, :, :count]
        own = queries[place] if clustering.query_space else None
        return grow_layer(old, plan, *new, own, clustering, slope=True)

    places, on_cpu = range(len(views)), views[0].keys.device.type == "cpu"
    layers = tuple(each_in_a_thread(grow, places) if on_cpu else map(grow, places))
    known = cache.known[:count]
    made = ContextRecord(
        tokens=known if before is None else torch.cat([before.tokens, known]),
        layers=layers,
        windows=(None,) * len(layers),
        calibrations={},
        config=replace(context.config, clustering=clustering),
        template=context.template,
        model=context.model,
        tokenizer=context.tokenizer,
        seconds={},
        observed=tuple(queries),
        trees=plan.trees,
    )
    return replace(made, calibrations=_calibrations(made, context, asking))


def _calibrations(
    made: ContextRecord, context: ContextRecord, asking: Asking
) -> dict[str, Calibration]:
    """Thresholds of the one preset that is asked for, fitted on the last queries."""
    known = context.calibrations.get(asking.preset)
    if known is None:  # a method without
        return {}
    seen = (ObservedLayer(*x) for x in zip(made.clustered_layers, made.observed, strict=True))
    settings = known.preset, context.config.budgets, context.config.calibration
    return {asking.preset: calibrate(Forest.of(tuple(seen)), *settings)}


def _last_queries(view: ContextLayer) -> Tensor:
    """The last ones that were asked, `[Hq, W, D]`."""
    assert view.watch
    return torch.cat([query[0] for query in view.watch], 1)[:, -QUERIES:].clone()


def _nothing(shared: ClusteredLayer) -> ClusteredLayer:
    """A layer without a row, whose keys will be relative to the same centre."""
    heads, dim = shared.centre.shape
    rows = shared.centre.new_zeros(heads, 0, dim)
    positions = torch.zeros(heads, 0, dtype=torch.int16, device=rows.device)
    slope = shared.centre.new_zeros(heads, dim, dim)
    return ClusteredLayer(Rows(rows, rows), positions, 0, (), slope, shared.centre, shared.scale)
