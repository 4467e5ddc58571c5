"""Squeezed Attention itself: thresholds on cluster scores (arXiv 2411.09688)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from squeezed import attention as ops
from squeezed.attention.interface import causal_mask
from squeezed.attention.reference.lookup import lookup
from squeezed.config import BEST
from squeezed.context.layers import ClusteredLayer
from squeezed.context.record import ContextRecord
from squeezed.context.rule import SelectionRule
from squeezed.errors import SqueezedError
from squeezed.methods.base import ContextAttention
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
    single_tokens: int
    compute: Callable[..., tuple[Tensor, Tensor]]

    @property
    def rule(self) -> SelectionRule:
        return self.token

    def tensors(self) -> list[Tensor]:
        return [*self.layer.tensors(), *self.token.tensors(), *self.block.tensors()]

    def attend(
        self,
        query: Tensor,
        suffix_keys: Tensor,
        suffix_values: Tensor,
        suffix_mask: Tensor | None,
        scale: float,
        per_token: bool,
    ) -> tuple[Tensor, Tensor]:
        self._check_heads(query, suffix_keys)
        rows = query.shape[2]
        early = 0 if per_token else max(0, rows - self.single_tokens)
        if suffix_mask is None and early:
            suffix_mask = causal_mask(rows, suffix_keys.shape[2], query.device)
        outputs, keys_read = [], 0
        for rule, part in ((self.block, slice(0, early)), (self.token, slice(early, rows))):
            if part.start == part.stop:
                continue
            output, read = self.compute(
                query[:, :, part],
                self.layer,
                rule,
                suffix_keys,
                suffix_values,
                None if suffix_mask is None else suffix_mask[:, :, part],
                scale,
            )
            outputs.append(output)
            keys_read = keys_read + read
        return torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0], keys_read

    def _check_heads(self, query: Tensor, suffix_keys: Tensor) -> None:
        """Kernels read as many rows as the query says: a context of another shape ends here."""
        heads, _, dim = self.layer.keys.shape
        found = query.shape[1], suffix_keys.shape[1], query.shape[3]
        alpha = self.token.alpha
        query_heads = found[0] // heads * heads if alpha is None else alpha.shape[1]
        if found != (query_heads, heads, dim):
            raise SqueezedError(
                f"context: it has {query_heads} query heads, {heads} KV heads and {dim} dimensions,"
                f" the model {found[0]}, {found[1]} and {found[2]}; index the document again"
            )

    def index_bytes(self, query: Tensor, scale: float) -> Tensor | float:
        if not self.layer.levels:
            return 0.0
        found = lookup(query, self.layer, self.token, scale)
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
                single_tokens=calibration.preset.single_tokens,
                compute=ops.implementation(self.implementation, layer.keys.device),
            )
            for index, layer in enumerate(context.clustered_layers)
        ]
