"""How a context came to be what it is: its pieces of text, its trees, and what every change cost.

A context that was indexed at once says nothing of this: it is one piece and one tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

from squeezed.errors import whole

if TYPE_CHECKING:
    from squeezed.context.record import ContextRecord

Kind = Literal["index", "append", "crop", "replace"]


@dataclass(frozen=True)
class Tree:
    """A stretch of the document whose keys were clustered together, in every layer.

    Trees lie one behind the other, in the rows and in the nodes of each level, in the order of the
    document.

    Attributes:
        tokens: of the stretch; the pinned ones belong to no tree.
        nodes: per head, of every level, coarse to fine.
    """

    tokens: int
    nodes: tuple[int, ...]

    def __post_init__(self) -> None:
        whole("tokens", self.tokens, 1)
        for count in self.nodes:
            whole("nodes", count, 1)


@dataclass(frozen=True)
class Change:
    """What one version of a context has of the one before, and what it cost.

    Attributes:
        kind: `index` is the first version.
        tokens: of this version.
        kept: its first tokens, whose keys and values are those of the version before.
        dropped: tokens of the version before that are not kept.
        read: tokens that the model read, a calibrating question included.
        clustered: tokens whose keys were clustered.
        calibrated: whether thresholds were fitted anew.
        centre_fits: whether what the keys share is still what was taken off them. If not, keys in
            16 bits are rounded more coarsely than those of a text indexed at once.
        seconds: in all.
    """

    kind: Kind
    tokens: int
    kept: int
    dropped: int
    read: int
    clustered: int
    calibrated: bool
    centre_fits: bool
    seconds: float

    def __post_init__(self) -> None:
        for name in ("tokens", "kept", "dropped", "read", "clustered"):
            whole(name, getattr(self, name), 0)

    @property
    def added(self) -> int:
        """Tokens of this version that are not kept."""
        return self.tokens - self.kept


def pieces_of(context: ContextRecord) -> tuple[int, ...]:
    """Tokens of every text that was tokenised by itself, the first with what stands before it."""
    return context.pieces or (len(context.tokens),)


def cut_pieces(pieces: Sequence[int], tokens: int) -> tuple[int, ...]:
    """Pieces of the first `tokens` tokens."""
    starts = accumulate(pieces, initial=0)
    kept = (min(piece, tokens - start) for piece, start in zip(pieces, starts, strict=False))
    return tuple(piece for piece in kept if piece > 0)


def trees_of(context: ContextRecord) -> tuple[Tree, ...]:
    """The trees, in the order of the document; none if it is too short to cluster."""
    outline = next(outline for outline in context.outlines if outline.is_clustered)
    if not outline.nodes:
        return ()
    return context.trees or (Tree(outline.rows - outline.pinned, outline.nodes),)


def history_of(context: ContextRecord) -> tuple[Change, ...]:
    """What happened so far, the first version included."""
    if context.history:
        return context.history
    tokens = len(context.tokens)
    clustered = sum(tree.tokens for tree in trees_of(context))
    seconds = sum(context.seconds.values())
    return (Change("index", tokens, 0, 0, tokens, clustered, True, True, seconds),)


def changed_since_calibration(history: Sequence[Change]) -> int:
    """Tokens that came or went since thresholds were fitted."""
    changed = 0
    for change in reversed(history):
        if change.calibrated:
            break
        changed += change.added + change.dropped
    return changed
