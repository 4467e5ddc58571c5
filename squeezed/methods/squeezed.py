"""Squeezed Attention itself: thresholds on cluster scores (arXiv 2411.09688)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from squeezed import attention as ops
from squeezed.attention.interface import Attended, Suffix, in_sequence
from squeezed.attention.reference.lookup import lookup
from squeezed.config import BEST
from squeezed.context.layers import ClusteredLayer
from squeezed.context.record import ContextRecord
from squeezed.context.rule import SelectionRule
from squeezed.errors import SqueezedError
from squeezed.methods.base import Blocks, ContextAttention
from squeezed.methods.traffic import tree_bytes


@dataclass(frozen=True)
class SqueezedLayer(ContextAttention):
    """A clustered layer with the rules of one token and of a block of the user's tokens.

    The last `single_tokens` of an input select alone, for the answer hangs on them; those before
    select in blocks, which read fewer bytes together.
    """

    layer: ClusteredLayer
    token: SelectionRule
    block: SelectionRule
    blocks: Blocks
    compute: Callable[..., Attended]

    @property
    def rule(self) -> SelectionRule:  # type: ignore[override]  # not a field of its own
        return self.token

    def tensors(self) -> list[Tensor]:
        return [*self.layer.tensors(), *self.token.tensors(), *self.block.tensors()]

    def attend(
        self,
        query: Tensor,
        suffix: Suffix | None = None,
        valid: Tensor | None = None,
        per_token: bool = False,
    ) -> Attended:
        self._check_heads(query, suffix)
        rows = query.shape[2]
        early = self.blocks.early(rows, per_token)
        parts = []
        for rule, first, last in ((self.block, 0, early), (self.token, early, rows)):
            if first < last:
                recent = None if suffix is None else suffix.of_rows(first, last, rows)
                real = None if valid is None else valid[:, first:last]
                parts.append(self.compute(query[:, :, first:last], self.layer, rule, recent, real))
        return in_sequence(parts)

    def _check_heads(self, query: Tensor, suffix: Suffix | None) -> None:
        """Kernels read as many rows as the query says: a context of another shape ends here."""
        heads, dim = self.layer.kv_heads, self.layer.dim
        own_heads = heads if suffix is None else suffix.keys.shape[1]
        found = query.shape[1], own_heads, query.shape[3]
        alpha = self.token.alpha
        query_heads = found[0] // heads * heads
        if alpha is not None and len(alpha):  # one of no levels, from a file, does not know
            query_heads = alpha.shape[1]
        if found != (query_heads, heads, dim):
            raise SqueezedError(
                f"context: it has {query_heads} query heads, {heads} KV heads and {dim} dimensions,"
                f" the model {found[0]}, {found[1]} and {found[2]}; index the document again"
            )

    def index_bytes(self, query: Tensor) -> Tensor | float:
        if not self.layer.levels:
            return 0.0
        found = lookup(query, self.layer, self.token)
        second_order = self.token.alpha is not None
        return tree_bytes(self.layer, found, second_order, self.token.far_field)


@dataclass(frozen=True)
class Squeezed:
    """The method of this package, under one of a context's presets."""

    name = "squeezed"
    paper = "https://arxiv.org/abs/2411.09688"

    preset: str = BEST.name
    implementation: str = "auto"

    def prepare(self, context: ContextRecord, budget: float) -> list[SqueezedLayer]:
        calibration = context.calibration(self.preset)
        return [
            SqueezedLayer(
                layer,
                token=calibration.rule(index, budget, block=False),
                block=calibration.rule(index, budget, block=True),
                blocks=Blocks(calibration.preset.query_block, calibration.preset.single_tokens),
                compute=ops.implementation(self.implementation, layer.device),
            )
            for index, layer in enumerate(context.clustered_layers)
        ]
