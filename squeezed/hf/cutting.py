"""The first tokens of a context: what follows them is taken out, and nothing is read."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from squeezed.config import ClusteringConfig, GrowthConfig
from squeezed.context.growth import (
    Change,
    Tree,
    changed_since_calibration,
    cut_pieces,
    history_of,
    pieces_of,
    trees_of,
)
from squeezed.context.layers import ClusteredLayer
from squeezed.context.record import ContextRecord
from squeezed.errors import SqueezedError
from squeezed.hf.growing import Context, Progress, calibrated
from squeezed.indexing.cropping import crop_layer, cropped_trees
from squeezed.indexing.growing import Plan, centre_fits, grow_layer, with_slope
from squeezed.indexing.threads import each_in_a_thread


def cut(context: Context, tokens: int) -> Context:
    """The first `tokens` tokens: nodes are those that were there, and thresholds too, unless
    nothing is left to cluster.

    Raises:
        SqueezedError: layers with sliding windows, which keep the last tokens only.
    """
    _check(context, tokens)
    clustering = context.config.clustering
    trees = cropped_trees(trees_of(context), tokens, clustering)

    layers = context.clustered_layers

    def one(place: int) -> ClusteredLayer:
        return crop_layer(layers[place], tokens, trees, _queries(context, place), clustering)

    made = replace(
        context,
        tokens=context.tokens[:tokens],
        layers=_of_all(context, one),
        pieces=cut_pieces(pieces_of(context), tokens),
        trees=trees,
        history=history_of(context),
    )
    return made if trees or not trees_of(context) else calibrated(made, lambda *step: None)


def cut_change(context: Context, tokens: int, config: GrowthConfig, progress: Progress) -> Context:
    """The same as a version of its own: what is left of a tree is clustered anew if it is little,
    and thresholds are fitted anew if much has gone."""
    started, past = time.perf_counter(), history_of(context)
    made = cut(context, tokens)
    clustered = 0
    if made.trees and _is_thin(made.trees[-1], context.config.clustering, config):
        clustered = made.trees[-1].tokens
        made = _planted_anew(made)
    dropped = len(context.tokens) - tokens
    anew = changed_since_calibration(past) + dropped > config.calibrate_share * tokens
    clustering = context.config.clustering
    if anew and made.observed:
        if made.trees:
            made = replace(
                made, layers=tuple(with_slope(layer, clustering) for layer in made.clustered_layers)
            )
        made = calibrated(made, progress)
    fits = all(centre_fits(layer, clustering) for layer in made.clustered_layers)
    change = Change(
        kind="crop",
        tokens=tokens,
        kept=tokens,
        dropped=dropped,
        read=0,
        clustered=clustered,
        calibrated=anew and bool(made.observed),
        centre_fits=fits,
        seconds=time.perf_counter() - started,
    )
    return replace(made, history=(*past, change))


def _check(context: ContextRecord, tokens: int) -> None:
    if any(window is not None for window in context.windows):
        raise SqueezedError(
            "tokens: this model has layers with sliding windows, whose keys before the end are "
            f"gone, so that a text cannot be cut to {tokens:,} tokens; index the text again"
        )
    if not context.observed:
        raise SqueezedError(
            "tokens: this context kept no queries to calibrate with; index the text again"
        )
    for layer in context.clustered_layers:
        layer.rows.plain()


def _queries(context: ContextRecord, place: int) -> Tensor | None:
    return context.observed[place] if context.config.clustering.query_space else None


def _is_thin(tree: Tree, clustering: ClusteringConfig, config: GrowthConfig) -> bool:
    """Whether so few of its tokens are left that its nodes are too many."""
    fitting = max(1, round(clustering.levels[-1] * tree.tokens))
    return fitting < config.least_left * tree.nodes[-1]


def _of_all(
    context: ContextRecord, work: Callable[[int], ClusteredLayer]
) -> tuple[ClusteredLayer, ...]:
    """What `work` makes of every layer, by its place; there are no windows among them."""
    places = range(len(context.layers))
    on_cpu = context.clustered_layers[0].rows.device.type == "cpu"
    return tuple(each_in_a_thread(work, places) if on_cpu else map(work, places))


def _planted_anew(context: Context) -> Context:
    """The last tree clustered again."""
    tokens, clustering, trees = len(context.tokens), context.config.clustering, context.trees
    layers = context.clustered_layers
    plan = Plan.of(trees, len(trees) - 1, tokens, tokens, clustering)

    def one(place: int) -> ClusteredLayer:
        layer = layers[place]
        nothing = layer.keys[:, :0], layer.values[:, :0]
        queries = _queries(context, place)
        return grow_layer(layer, plan, *nothing, queries, clustering, slope=False)

    return replace(context, layers=_of_all(context, one), trees=plan.trees)
