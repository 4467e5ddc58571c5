"""Plain PyTorch for methods that say which rows of the context each query reads.

Rows are those of `ClusteredLayer` behind the pinned ones, `R = P - pinned`; `layer.positions` tells
their place in the document. All methods here share three rules: the pinned tokens are always read;
a KV head's key is read by all query heads of its group; and tokens of the user select alone or in
blocks, by the mean of their weights, exactly where squeezed attention does.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from squeezed.attention.interface import Attended, Suffix
from squeezed.attention.reference.attention import softmax_over
from squeezed.attention.scores import NEG_INF, block_count, block_scores, grouped, query_blocks
from squeezed.context.encoding import wide
from squeezed.context.layers import ClusteredLayer
from squeezed.methods.base import Blocks, ContextAttention

FarField = tuple[Tensor, Tensor]
"""Log masses `[B, Hkv, G, Q, F]` and mean values `[Hkv, F, D]` of what was not read exactly."""

MOST_LOGITS = 1 << 28
"""Logits of all keys held at once; more queries are worked on in turns."""


@dataclass(frozen=True)
class Queries:
    """The queries of one call.

    Attributes:
        q: `[B, Hkv, G, Q, D]` float32 or float64.
        valid: `[B, Q]` bool, False for padding.
        single: the last rows, which select alone; those before select in blocks.
        scale: softmax scale.
        query_block: rows of a block.
    """

    q: Tensor
    valid: Tensor
    single: int
    scale: float
    query_block: int

    @property
    def early(self) -> int:
        """Rows that select in blocks."""
        return self.q.shape[3] - self.single

    @property
    def count(self) -> int:
        """Blocks and single rows, `N`; each selects separately."""
        return block_count(self.early, self.query_block) + self.single

    @cached_property
    def blocks(self) -> Tensor:
        """Which of the `N` every row belongs to, `[Q]`."""
        device = self.q.device
        early = query_blocks(self.early, self.query_block, device)
        return torch.cat([early, torch.arange(self.count - self.single, self.count, device=device)])

    def logits(self, keys: Tensor) -> Tensor:
        """Scaled scores of `keys [Hkv, K, D]`, `[B, Hkv, G, Q, K]`."""
        return self.scale * torch.einsum("bhgqd,hkd->bhgqk", self.q, keys.to(self.q.dtype))

    def shared(self, log_weights: Tensor) -> Tensor:
        """Mean over each block, largest over the group: `[B, Hkv, G, Q, K] -> [B, Hkv, N, K]`."""
        early, valid = self.early, self.valid
        alone = log_weights[..., early:, :].amax(2)
        alone = alone.masked_fill(~valid[:, None, early:, None], NEG_INF)
        if not early:
            return alone
        blocks = block_scores(log_weights[..., :early, :], self.query_block, valid[:, :early])
        return torch.cat([blocks, alone], 2)


@dataclass(frozen=True)
class MaskedLayer(ContextAttention):
    """A `ContextAttention` whose subclass only decides which rows are read."""

    layer: ClusteredLayer
    budget: float
    blocks: Blocks

    @property
    def budget_keys(self) -> int:
        """Rows that each KV head may read."""
        return round(self.budget * self.layer.clustered)

    @abc.abstractmethod
    def keep(self, queries: Queries) -> Tensor:
        """Which rows are read, bool, broadcasts to `[B, Hkv, N, R]`."""

    def far_field(self, queries: Queries) -> FarField | None:
        """What the rows that are not read still count; nothing for most methods."""
        return None

    def attend(
        self,
        query: Tensor,
        suffix: Suffix | None = None,
        valid: Tensor | None = None,
        per_token: bool = False,
    ) -> Attended:
        batch, _, rows, _ = query.shape
        if valid is None:
            valid = torch.ones(batch, rows, dtype=torch.bool, device=query.device)
        queries = Queries(
            q=grouped(query, self.layer.kv_heads),
            valid=valid,
            single=rows - self.blocks.early(rows, per_token),
            scale=self.layer.scale,
            query_block=self.blocks.query_block,
        )
        keep = self._keep_all_blocks(queries)
        far = self.far_field(queries) if self.layer.clustered else None
        output, log_mass = masked_attention(queries, self.layer, keep, far, suffix)
        counted = keep.sum((1, 3))[:, queries.blocks] * valid
        output = output.reshape(query.shape).to(query.dtype)
        return Attended(output, log_mass.flatten(1, 2), counted.sum(-1))

    def _keep_all_blocks(self, queries: Queries) -> Tensor:
        batch, heads = queries.q.shape[:2]
        shape = (batch, heads, queries.count, self.layer.clustered)
        if not self.layer.clustered:
            return torch.zeros(shape, dtype=torch.bool, device=queries.q.device)
        return self.keep(queries).expand(shape)


def masked_attention(
    queries: Queries,
    layer: ClusteredLayer,
    keep: Tensor,
    far: FarField | None,
    suffix: Suffix | None,
) -> tuple[Tensor, Tensor]:
    """Softmax over pinned rows, the rows `keep [B, Hkv, N, R]`, a far field and the suffix.

    Returns:
        Output `[B, Hkv, G, Q, D]` and log mass `[B, Hkv, G, Q]`, in the queries' precision.
    """
    batch, kv_heads, group, rows, _ = queries.q.shape
    dtype = queries.q.dtype
    keys, values = wide(layer, dtype)
    step = max(1, MOST_LOGITS // (batch * kv_heads * group * layer.tokens))
    found = []
    for first in range(0, rows, step):
        own = slice(first, min(first + step, rows))
        part = replace(queries, q=queries.q[:, :, :, own], valid=queries.valid[:, own])
        context = part.logits(keys)
        read = keep[:, :, queries.blocks[own]].unsqueeze(2)
        context[..., layer.pinned :].masked_fill_(~read, NEG_INF)
        parts = [(context, values)]
        if far is not None:
            parts.append((far[0][:, :, :, own], far[1].to(dtype)))
        if suffix is not None:
            recent = suffix.of_rows(own.start, own.stop, rows)
            parts.append((recent.logits(part.q, layer.scale), recent.values.to(dtype)))
        found.append(softmax_over(parts, part.valid)[:2])
    outputs, masses = zip(*found, strict=True)
    return torch.cat(outputs, 3), torch.cat(masses, 3)


def top_rows(scores: Tensor, count: int) -> Tensor:
    """The `count` highest entries of the last dimension, without those at minus infinity."""
    best = scores.topk(min(count, scores.shape[-1]), -1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True) & (scores > NEG_INF)


def fill(scores: Tensor, sizes: Tensor, keys: int) -> Tensor:
    """Best nodes first until their keys come nearest to `keys`: bool like `scores`.

    Args:
        scores: `[B, Hkv, N, C]`, minus infinity where a node cannot be chosen.
        sizes: `[Hkv, C]`, keys in each node.
    """
    order = scores.argsort(-1, descending=True)
    ranked = sizes[None, :, None].expand(scores.shape).gather(-1, order)
    taken = 2 * ranked.cumsum(-1) - ranked < 2 * keys
    return torch.zeros_like(taken).scatter_(-1, order, taken) & (scores > NEG_INF)


def document_rank(layer: ClusteredLayer) -> Tensor:
    """Place in the document of every row behind the pinned ones, from 0 to R - 1, `[Hkv, R]`."""
    return layer.positions[:, layer.pinned :].argsort(-1).argsort(-1)
