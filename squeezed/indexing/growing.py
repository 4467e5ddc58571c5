"""New rows behind a layer's old ones: clustered among themselves, as subtrees of their own.

Nodes of the new subtrees stand behind the old nodes of each level, and their rows behind the old
rows, so a node stays one run of rows. Old rows that belong to clusters, and old nodes, stay bit by
bit what they were. What was pinned because the document ended there is clustered with the new rows,
and the new end is pinned in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from squeezed.config import ClusteringConfig
from squeezed.context.growth import Tree
from squeezed.context.layers import ClusteredLayer, Level
from squeezed.context.rows import Rows
from squeezed.errors import ContextFileError
from squeezed.indexing.clustering import _held, _narrow, _points, build_tree, common_part, steps_on
from squeezed.indexing.kmeans import take_rows
from squeezed.indexing.statistics import value_slope


@dataclass(frozen=True)
class Plan:
    """What of a layer stays, and what is clustered behind it; the same for all layers.

    Attributes:
        kept: trees that stay as they are, the first ones.
        old, tokens: of the document before and after.
        first, pinned: of the first tokens, and of all, how many will be pinned.
        planted: the new tree; `None` if the document stays too short to cluster.
    """

    kept: tuple[Tree, ...]
    old: int
    tokens: int
    first: int
    pinned: int
    planted: Tree | None

    @classmethod
    def of(
        cls, trees: Sequence[Tree], kept: int, old: int, tokens: int, config: ClusteringConfig
    ) -> Plan:
        """Keep the first `kept` of `trees`; cluster all that follows."""
        first, pinned = config.pinned(tokens)
        stay = tuple(trees[:kept])
        count = tokens - pinned - sum(tree.tokens for tree in stay)
        if not config.counts(tokens):
            return cls((), old, tokens, first, tokens, None)
        nodes = tuple(max(1, round(share * count)) for share in config.levels)
        return cls(stay, old, tokens, first, pinned, Tree(count, nodes))

    @property
    def trees(self) -> tuple[Tree, ...]:
        return self.kept if self.planted is None else (*self.kept, self.planted)

    @property
    def start(self) -> int:
        """The first token behind the trees that stay."""
        return self.first + sum(tree.tokens for tree in self.kept)


def grow_layer(
    layer: ClusteredLayer,
    plan: Plan,
    keys: Tensor,
    values: Tensor,
    queries: Tensor | None,
    config: ClusteringConfig,
    slope: bool,
) -> ClusteredLayer:
    """The layer with `n` more tokens.

    Args:
        keys, values: `[Hkv, n, D]`, the new ones in document order, keys relative to the layer's
            centre.
        queries: `[Hq, W, D]`, in whose space the new rows are compared; `None` compares raw keys.
        slope: find the slope of values anew, from all rows.
    """
    _check_trees(layer, plan)
    together = Rows(torch.cat([layer.keys, keys], 1), torch.cat([layer.values, values], 1))
    new = torch.arange(plan.old, plan.tokens, device=keys.device).expand(len(keys), -1)
    positions = torch.cat([layer.positions.long(), new], 1)
    row_of = positions.argsort(1)  # of every token
    if plan.planted is None:
        return unclustered(layer, together, row_of)
    fresh = row_of[:, plan.start : plan.start + plan.planted.tokens]
    k, v = (take_rows(x, fresh) for x in (together.keys, together.values))
    order, levels = plant(k, v, layer.centre, queries, plan.planted, config)
    stay = torch.arange(plan.start - plan.first, device=keys.device) + layer.pinned
    last = row_of[:, plan.start + plan.planted.tokens :]
    front = row_of[:, : plan.first], last, stay.expand(len(keys), -1)
    taken = torch.cat([*front, fresh.gather(1, order)], 1)
    made = replace(
        layer,
        rows=rows_at(together, taken),
        positions=_narrow(positions.gather(1, taken)),
        pinned=plan.pinned,
        levels=_joined(layer, plan, levels),
    )
    return with_slope(made, config) if slope else made


def rows_at(rows: Rows, taken: Tensor) -> Rows:
    """Rows in an order of their own for every head, `[Hkv, n]`."""
    keys, values = rows.plain()
    return Rows(take_rows(keys, taken), take_rows(values, taken))


def unclustered(layer: ClusteredLayer, rows: Rows, row_of: Tensor) -> ClusteredLayer:
    """A layer whose tokens are all pinned, from the row `[Hkv, P]` of each."""
    positions = torch.arange(row_of.shape[1], device=row_of.device).repeat(len(row_of), 1)
    return replace(
        layer,
        rows=rows_at(rows, row_of),
        positions=_narrow(positions),
        pinned=row_of.shape[1],
        levels=(),
        value_slope=torch.zeros_like(layer.value_slope),
    )


def with_slope(layer: ClusteredLayer, config: ClusteringConfig) -> ClusteredLayer:
    """The layer with the slope of values that its rows and leaves have."""
    behind = layer.keys[:, layer.pinned :], layer.values[:, layer.pinned :]
    slope = value_slope(*behind, layer.levels[-1], config.space.plain_share)
    return replace(layer, value_slope=_held(slope, layer.keys.dtype))


def centre_fits(layer: ClusteredLayer, config: ClusteringConfig) -> bool:
    """Whether the keys have nothing in common beside the layer's centre."""
    return not bool(common_part(layer.keys, config.common_part).any())


def plant(
    keys: Tensor,
    values: Tensor,
    centre: Tensor,
    queries: Tensor | None,
    tree: Tree,
    config: ClusteringConfig,
) -> tuple[Tensor, tuple[Level, ...]]:
    """Cluster rows of one layer by themselves.

    Args:
        keys, values: `[Hkv, n, D]` in document order, keys relative to `centre` `[Hkv, D]`.

    Returns:
        The order of the rows `[Hkv, n]`, and the levels, whose offsets count from the first of
        these rows and of these nodes.
    """
    raw = keys + centre[:, None]  # rounded, which moves a direction by nothing
    points, space = _points([raw], [values], [queries], [centre], config.space)
    order, offsets, children = build_tree(points, tree.nodes, config)
    if space is not None:
        space = replace(space, energy=space.energy.gather(1, order))
    sorted_keys, sorted_values = take_rows(keys, order), take_rows(values, order)
    describe = steps_on(keys.device).describe_level
    levels = tuple(
        describe(sorted_keys, sorted_values, own, below, space)
        for own, below in zip(offsets, children, strict=True)
    )
    return order, levels


def _check_trees(layer: ClusteredLayer, plan: Plan) -> None:
    """Raise `ContextFileError` unless the trees that stay end where the description says."""
    for depth, level in enumerate(layer.levels):
        nodes = sum(tree.nodes[depth] for tree in plan.kept)
        ends = level.key_offsets[:, nodes] - layer.pinned
        if bool((ends != plan.start - plan.first).any()):
            raise ContextFileError(
                "context: its trees are not those that its description names; index the document "
                "again"
            )


def _joined(layer: ClusteredLayer, plan: Plan, new: Sequence[Level]) -> tuple[Level, ...]:
    """Nodes that stay, and behind them the new ones, of every level."""
    rows = plan.pinned + plan.start - plan.first
    counts = [sum(tree.nodes[depth] for tree in plan.kept) for depth in range(len(new))]
    moved = (_shifted(*pair) for pair in zip(new, [rows] * len(new), [*counts[1:], 0], strict=True))
    if not plan.kept:
        return tuple(moved)
    each = zip(layer.levels, counts, moved, strict=True)
    return tuple(_behind(old, count, own) for old, count, own in each)


def _behind(old: Level, count: int, new: Level) -> Level:
    """The first nodes of one level, and behind them those of another."""
    parts: dict[str, Any] = {}
    for field in fields(Level):
        ours, theirs = getattr(old, field.name), getattr(new, field.name)
        parts[field.name] = None if theirs is None else torch.cat([ours[:, :count], theirs], 1)
    return Level(**parts)


def _shifted(level: Level, rows: int, nodes: int) -> Level:
    children = level.child_offsets
    return replace(
        level,
        key_offsets=level.key_offsets + rows,
        child_offsets=None if children is None else children + nodes,
    )
