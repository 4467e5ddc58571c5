"""The first tokens of a layer: rows of later ones are taken out of their clusters.

What is left of a cluster stays one run of rows in the same order. Nodes that lost rows are
described anew, the others stay bit by bit; trees that lost all of them go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import pad

from squeezed.config import ClusteringConfig
from squeezed.context.growth import Tree
from squeezed.context.layers import ClusteredLayer, Level
from squeezed.indexing.clustering import _narrow, steps_on
from squeezed.indexing.growing import rows_at, unclustered
from squeezed.indexing.products import mapped_rows
from squeezed.indexing.space import Space, space_factor


def cropped_trees(trees: Sequence[Tree], tokens: int, config: ClusteringConfig) -> tuple[Tree, ...]:
    """What is left of the trees in a document cut to `tokens`; none if it is too short for any."""
    if not config.counts(tokens):
        return ()
    left, kept = tokens - config.pinned(tokens)[1], []
    for tree in trees:
        if left <= 0:
            break
        kept.append(replace(tree, tokens=min(tree.tokens, left)))
        left -= kept[-1].tokens
    return tuple(kept)


def crop_layer(
    layer: ClusteredLayer,
    tokens: int,
    trees: Sequence[Tree],
    queries: Tensor | None,
    config: ClusteringConfig,
) -> ClusteredLayer:
    """The layer of the first `tokens` tokens.

    Args:
        trees: `cropped_trees`, whose nodes stay.
        queries: `[Hq, W, D]`, in whose space variances are measured; `None` among raw keys.
    """
    positions = layer.positions.long()
    row_of = positions.argsort(1)[:, :tokens]
    if not trees:
        return unclustered(layer, layer.rows, row_of)
    first, pinned = config.pinned(tokens)
    last = tokens - pinned + first
    behind = positions[:, layer.pinned :]
    kept = (behind >= first) & (behind < last)
    rows = torch.arange(layer.pinned, layer.tokens, device=kept.device).expand_as(kept)[kept]
    front = row_of[:, :first], row_of[:, last:]
    taken = torch.cat([*front, rows.view(len(kept), -1)], 1)
    made = replace(
        layer,
        rows=rows_at(layer.rows, taken),
        positions=_narrow(positions.gather(1, taken)),
        pinned=pinned,
        levels=(),
    )
    before = pad(kept.cumsum(1), (1, 0))  # rows kept of the first so many
    space = None if queries is None else _space(made, queries, config)
    levels = (
        _cropped(level, depth, made, layer.pinned, before, trees, space)
        for depth, level in enumerate(layer.levels)
    )
    return replace(made, levels=tuple(levels))


def _cropped(
    level: Level,
    depth: int,
    made: ClusteredLayer,
    pinned: int,
    before: Tensor,
    trees: Sequence[Tree],
    space: Space | None,
) -> Level:
    """The first nodes of a level with the rows that are left of them.

    Args:
        pinned: rows before the clusters, in the layer before.
        before: `[Hkv, clustered + 1]`, how many of the first clustered rows are left.
    """
    nodes = sum(tree.nodes[depth] for tree in trees)
    offsets = made.pinned + before.gather(1, (level.key_offsets[:, : nodes + 1] - pinned).long())
    children = level.child_offsets
    below = None if children is None else children[:, : nodes + 1]
    describe = steps_on(offsets.device).describe_level
    anew = describe(made.keys, made.values, offsets, below, space)
    same = anew.sizes == level.sizes[:, :nodes]
    return replace(
        anew,
        centroids=torch.where(same[..., None], level.centroids[:, :nodes], anew.centroids),
        mean_values=torch.where(same[..., None], level.mean_values[:, :nodes], anew.mean_values),
        variance=torch.where(same, level.variance[:, :nodes], anew.variance),
    )


def _space(layer: ClusteredLayer, queries: Tensor, config: ClusteringConfig) -> Space:
    """The queries' space, and where the clustered rows lie in it."""
    keys = layer.keys[:, layer.pinned :]
    factor = space_factor(queries, len(keys), config.space.plain_share)
    compared = mapped_rows(keys, factor)
    middle = compared.mean(1, keepdim=True)
    away = vector_norm(compared.sub_(middle), dim=-1).square_()
    return Space(factor, middle, away.div_(keys.shape[2]))
