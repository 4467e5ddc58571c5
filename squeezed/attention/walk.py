"""The walk down the tree in PyTorch: what queries make of every level, the coarsest one first.

Whoever walks says which nodes it opens; children of others are not alive. The reference's lookup,
calibration, trials, Multipole and the rules of random layers all walk here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from squeezed.attention.scores import (
    log_normaliser,
    log_sizes,
    node_logits,
    of_owners,
    owners,
    second_order,
)
from squeezed.context.layers import ClusteredLayer, Level


@dataclass
class ScoredLevel:
    """One level, as queries `[B, Hkv, G, Q, D]` see it.

    Attributes:
        depth: 0 is the coarsest.
        first: first-order logits `s q.c`, `[B, Hkv, G, Q, C]`; `-inf` where a node is empty.
        selecting: the logits that select, `[B, Hkv, G, Q, C]`.
        normaliser: log of the mass of the coarsest level's nodes, `[B, Hkv, G, Q, 1]`.
        alive: filled nodes of opened parents, bool, broadcasts to `[B, Hkv, N, C]`.
        opened: which nodes' children come next, `[B, Hkv, N, C]` bool; set by who walks, and all of
            them where nobody does. `N` is what selects: rows, blocks of them, or rules.
    """

    depth: int
    level: Level
    first: Tensor
    selecting: Tensor
    normaliser: Tensor
    alive: Tensor
    opened: Tensor | None = None

    @property
    def log_scores(self) -> Tensor:
        """Logarithm of the softmax weight of one of a node's keys, `[B, Hkv, G, Q, C]`."""
        return self.selecting - self.normaliser

    @property
    def log_mass(self) -> Tensor:
        """Logarithm of a node's mass to first order, `[B, Hkv, G, Q, C]`."""
        return self.first + log_sizes(self.level.sizes, self.first)


def scored_levels(
    query: Tensor, layer: ClusteredLayer, alpha: Tensor | None = None
) -> Iterator[ScoredLevel]:
    """Every level of the tree, scored; set `opened` of one before you ask for the next.

    Args:
        query: `[B, Hkv, G, Q, D]` in the precision to work in (`grouped`).
        alpha: `[L, Hq]`, weights of the second-order term; `None` scores to first order.
    """
    normaliser = opened = None
    for depth, level in enumerate(layer.levels):
        first = node_logits(query, level, layer.scale)
        weight = None if alpha is None else alpha[depth]
        selecting = second_order(first, query, level, weight, layer.scale)
        if normaliser is None:
            normaliser = log_normaliser(selecting, level.sizes)
        filled = (level.sizes > 0)[None, :, None]
        alive = filled if opened is None else opened & filled
        found = ScoredLevel(depth, level, first, selecting, normaliser, alive)
        yield found
        opened = None
        if found.opened is not None and level.child_offsets is not None:
            opened = children(found.opened, level, layer.levels[depth + 1].nodes)


def children(of_nodes: Tensor, level: Level, nodes: int) -> Tensor:
    """What every node of the next finer level, of so many, has from its parent.

    Args:
        of_nodes: `[B, Hkv, N, C]`.

    Returns:
        `[B, Hkv, N, nodes]`.
    """
    assert level.child_offsets is not None
    return of_owners(of_nodes, owners(level.child_offsets, nodes))
