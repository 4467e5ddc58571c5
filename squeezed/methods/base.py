"""What a method of sparse attention over a fixed context must offer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from squeezed.context.layers import ClusteredLayer

if TYPE_CHECKING:
    from squeezed.context.record import ContextRecord


class ContextAttention(Protocol):
    """One layer of a fixed context, as one method reads it.

    Attributes:
        layer: keys, values and tree.
        tokens: length of the context.
        selectable_keys: keys per query token that the method chooses among, over all KV heads; the
            pinned ones, which every method reads, are not counted.
    """

    layer: ClusteredLayer
    tokens: int
    selectable_keys: int

    def tensors(self) -> list[Tensor]:
        """Tensors that `attend` reads beside its arguments: a CUDA graph holds them in place."""
        ...

    def attend(
        self,
        query: Tensor,
        suffix_keys: Tensor,
        suffix_values: Tensor,
        suffix_mask: Tensor | None,
        scale: float,
        per_token: bool,
    ) -> tuple[Tensor, Tensor]:
        """Attention of `query [B, Hq, Q, D]` over context and suffix.

        Args:
            suffix_keys, suffix_values: `[B, Hkv, S, D]`, always attended densely.
            suffix_mask: `[B, 1, Q, S]` bool, or `None` for causal without padding.
            per_token: every token selects alone; otherwise blocks of the user's tokens may share.

        Returns:
            Output `[B, Hq, Q, D]`, and the keys that each request read, `[B]` int64, summed over KV
            heads and query tokens, without the pinned ones.
        """
        ...

    def index_bytes(self, query: Tensor, scale: float) -> Tensor | float:
        """Bytes read beside keys and values by a decoding step of each token of `query`, in sum.

        Centroids, page bounds, links of a graph, mean values: whatever the method must read to
        choose keys, or puts in place of those it drops. Only evaluations call this. A scalar
        tensor is on the context's device, so that nobody need wait for it.
        """
        ...


class Method(Protocol):
    """A method of sparse attention: a name, a source, and its view of a context."""

    name: str
    paper: str

    def prepare(self, context: ContextRecord, budget: float) -> list[ContextAttention]:
        """One `ContextAttention` per full-attention layer of `context`, at `budget` in (0, 1]."""
        ...
