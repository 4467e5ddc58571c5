"""A layer of a shared context, and behind it one that belongs to a single request.

Two sets of keys with a tree each: every query reads both, and one softmax joins what they found.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from squeezed.attention.interface import Attended, Suffix, merge
from squeezed.context.layers import ClusteredLayer
from squeezed.context.rule import SelectionRule
from squeezed.methods.base import ContextAttention


@dataclass(frozen=True)
class ExtendedLayer(ContextAttention):
    """Both as one; the layer and the rule that it shows are those of the shared context.

    Attributes:
        shared, own: keys of both are relative to one centre.
    """

    shared: ContextAttention
    own: ContextAttention

    @property
    def layer(self) -> ClusteredLayer:  # type: ignore[override]  # not a field of its own
        return self.shared.layer

    @property
    def rule(self) -> SelectionRule | None:  # type: ignore[override]
        return self.shared.rule

    @property
    def tokens(self) -> int:
        return self.shared.tokens + self.own.tokens

    @property
    def selectable_keys(self) -> int:
        return self.shared.selectable_keys + self.own.selectable_keys

    def tensors(self) -> list[Tensor]:
        return [*self.shared.tensors(), *self.own.tensors()]

    def attend(
        self,
        query: Tensor,
        suffix: Suffix | None = None,
        valid: Tensor | None = None,
        per_token: bool = False,
    ) -> Attended:
        return merge(
            self.shared.attend(query, None, valid, per_token),
            self.own.attend(query, suffix, valid, per_token),
        )

    def index_bytes(self, query: Tensor) -> Tensor | float:
        return self.shared.index_bytes(query) + self.own.index_bytes(query)
