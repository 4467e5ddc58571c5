"""A saved context cut for one rank: to whole blocks of vLLM, and to the rank's heads.

vLLM shares heads out in equal runs; where there are more ranks than KV heads, several ranks hold
one KV head and a run of its query heads each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor

from squeezed.context.layers import ClusteredLayer, Level
from squeezed.context.rows import Rows
from squeezed.context.rule import SelectionRule
from squeezed.context.storage.outline import DTYPES, Outline, fields_of

MERGED_TOKENS = 4
"""Last tokens of a document that what follows may join: a tokenizer that sees document and question
as one text can split the place between them otherwise."""

Record = TypeVar("Record", ClusteredLayer, Level, Rows)


def whole_blocks(tokens: int, block_size: int) -> int:
    """Tokens of a document that vLLM need not hold; the rest is read with every request."""
    kept = max(0, tokens - MERGED_TOKENS)
    return kept - kept % block_size


@dataclass(frozen=True)
class Share:
    """A rank of tensor parallelism, among `size`."""

    rank: int = 0
    size: int = 1

    def heads(self, count: int) -> slice:
        """This rank's run of `count` heads; one head, perhaps held by others too, if few."""
        if count >= self.size:
            return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)
        own = self.rank * count // self.size
        return slice(own, own + 1)

    def layer(self, layer: ClusteredLayer) -> ClusteredLayer:
        """Its KV heads of a layer, as views."""
        return layer.of_heads(self.heads(layer.kv_heads))

    def rule(self, rule: SelectionRule) -> SelectionRule:
        """Thresholds of its KV heads, weights of its query heads."""
        own = self.heads(rule.log_thresholds.shape[1])
        cut = replace(rule, log_thresholds=rule.log_thresholds[:, own].contiguous())
        if rule.alpha is not None:
            cut = replace(cut, alpha=self._query_heads(rule.alpha))
        if rule.far_alpha is not None:
            cut = replace(cut, far_alpha=self._query_heads(rule.far_alpha))
        return cut

    def _query_heads(self, weights: Tensor) -> Tensor:
        return weights[..., self.heads(weights.shape[-1])].contiguous()


def without_last(layer: ClusteredLayer, dropped: int) -> ClusteredLayer:
    """A layer without the document's last tokens, which are pinned rows in document order.

    Rows `[pinned - dropped, pinned)` go; what lies behind moves up, and so do the offsets.
    """
    if not dropped:
        return layer
    start, stop = layer.pinned - dropped, layer.pinned
    levels = tuple(replace(lv, key_offsets=lv.key_offsets - dropped) for lv in layer.levels)
    positions = torch.cat([layer.positions[:, :start], layer.positions[:, stop:]], 1)
    rows = layer.rows.without(start, stop)
    return replace(layer, rows=rows, positions=positions, pinned=start, levels=levels)


def in_place(layer: ClusteredLayer, device: torch.device) -> ClusteredLayer:
    """The layer on `device`, in memory of its own."""

    def own(record: Record) -> Record:
        held: dict[str, Any] = {
            name: value.contiguous().to(device)
            for name, value in vars(record).items()
            if isinstance(value, Tensor)
        }
        return replace(record, **held)

    levels: tuple[Level, ...] = tuple(own(level) for level in layer.levels)
    return replace(own(layer), rows=own(layer.rows), levels=levels)


def bytes_on(outline: Outline, tokens: int, share: Share) -> int:
    """Bytes that a layer takes on a rank, from its description alone."""
    own = share.heads(outline.heads)
    cut = replace(outline, heads=own.stop - own.start)
    return sum(
        prod(sizes[size] for size in field.sizes)
        * (field.dtypes[-1] if field.dtypes else DTYPES[outline.dtype]).itemsize
        for _, field, sizes in fields_of(cut, tokens)
    )
