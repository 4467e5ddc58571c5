"""What a method of sparse attention over a fixed context must offer."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from squeezed.attention.interface import Attended, Suffix
from squeezed.config import BEST
from squeezed.context.layers import ClusteredLayer
from squeezed.context.rule import SelectionRule

if TYPE_CHECKING:
    from squeezed.context.record import ContextRecord


class ContextAttention(abc.ABC):
    """One layer of a fixed context, as one method reads it.

    Attributes:
        layer: keys, values and tree.
        rule: by which a single token selects nodes of the tree; `None` if the method has none.
    """

    layer: ClusteredLayer
    rule: SelectionRule | None = None

    @property
    def tokens(self) -> int:
        """Length of the context."""
        return self.layer.tokens

    @property
    def selectable_keys(self) -> int:
        """Keys per query token that the method chooses among, over all KV heads; the pinned ones,
        which every method reads, are not counted."""
        return self.layer.clustered * self.layer.kv_heads

    def tensors(self) -> list[Tensor]:
        """Tensors that `attend` reads beside its arguments: a CUDA graph holds them in place."""
        return self.layer.tensors()

    @abc.abstractmethod
    def attend(
        self,
        query: Tensor,
        suffix: Suffix | None = None,
        valid: Tensor | None = None,
        per_token: bool = False,
    ) -> Attended:
        """Attention of `query [B, Hq, Q, D]` over context and suffix.

        Args:
            suffix: each request's own tokens, always attended densely; `None`: the context alone.
            valid: `[B, Q]` bool, False for padding, which attends to nothing; `None`: no padding.
            per_token: every token selects alone; otherwise as `Blocks` has it.
        """

    def index_bytes(self, query: Tensor) -> Tensor | float:
        """Bytes read beside keys and values by a decoding step of each token of `query`, in sum.

        Centroids, page bounds, links of a graph, mean values: whatever the method must read to
        choose keys, or puts in place of those it drops. Only evaluations call this. A scalar
        tensor is on the context's device, so that nobody need wait for it.
        """
        return 0.0


@dataclass(frozen=True)
class Blocks:
    """How the tokens of a user's input share what they select.

    Attributes:
        query_block: tokens that select together.
        single_tokens: the last ones, which select alone.
    """

    query_block: int
    single_tokens: int

    def early(self, rows: int, per_token: bool) -> int:
        """How many of `rows` tokens select in blocks: the first ones; those behind select alone."""
        return 0 if per_token else max(0, rows - self.single_tokens)

    @classmethod
    def of(cls, context: ContextRecord) -> Blocks:
        """As the context's last preset has it, so that all methods select where ours does."""
        presets = [calibration.preset for calibration in context.calibrations.values()]
        preset = presets[-1] if presets else BEST
        return cls(preset.query_block, preset.single_tokens)


class Method(Protocol):
    """A method of sparse attention: a name, a source, and its view of a context."""

    name: str
    paper: str

    def prepare(self, context: ContextRecord, budget: float) -> Sequence[ContextAttention]:
        """One `ContextAttention` per full-attention layer of `context`, at `budget` in (0, 1]."""
        ...
