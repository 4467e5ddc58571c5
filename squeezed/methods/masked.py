"""Plain PyTorch for methods that say which rows of the context each query reads.

Rows are those of `ClusteredLayer` behind the pinned ones, `R = P - pinned`; `layer.positions` tells
their place in the document. All methods here share three rules: the pinned tokens are always read;
a KV head's key is read by all query heads of its group; and tokens of the user select alone or in
blocks, by the mean of their weights, exactly where squeezed attention does.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from squeezed.attention.interface import causal_mask
from squeezed.attention.reference.attention import softmax_or_nothing
from squeezed.attention.scores import NEG_INF, block_count, block_scores, grouped, query_blocks
from squeezed.context.layers import ClusteredLayer
from squeezed.methods.base import Blocks, ContextAttention

FarField = tuple[Tensor, Tensor]
"""Log masses `[B, Hkv, G, Q, F]` and mean values `[Hkv, F, D]` of what was not read exactly."""


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
        suffix_keys: Tensor,
        suffix_values: Tensor,
        suffix_mask: Tensor | None,
        scale: float,
        per_token: bool,
    ) -> tuple[Tensor, Tensor]:
        rows = query.shape[2]
        mask = causal(suffix_mask, rows, suffix_keys.shape[2], query.device)
        queries = Queries(
            q=grouped(query, self.layer.keys.shape[0]),
            valid=mask.any(-1)[:, 0].expand(query.shape[0], rows),
            single=rows if per_token else min(rows, self.blocks.single_tokens),
            scale=scale,
            query_block=self.blocks.query_block,
        )
        keep = self._keep_all_blocks(queries)
        far = self.far_field(queries) if self.layer.clustered else None
        read, suffix = keep[:, :, queries.blocks], (suffix_keys, suffix_values, mask)
        if far is None:
            output = masked_attention(query, self.layer, read, *suffix, scale)
        else:
            output = far_attention(queries, self.layer, read, far, *suffix)
        counted = read.sum((1, 3)) * queries.valid
        return output.reshape(query.shape).to(query.dtype), counted.sum(-1)

    def _keep_all_blocks(self, queries: Queries) -> Tensor:
        batch, heads = queries.q.shape[:2]
        shape = (batch, heads, queries.count, self.layer.clustered)
        if not self.layer.clustered:
            return torch.zeros(shape, dtype=torch.bool, device=queries.q.device)
        return self.keep(queries).expand(shape)


def causal(mask: Tensor | None, rows: int, suffix: int, device: torch.device) -> Tensor:
    """`mask`, or `[1, 1, Q, S]` for a causal suffix without padding."""
    return causal_mask(rows, suffix, device) if mask is None else mask


def masked_attention(
    query: Tensor,
    layer: ClusteredLayer,
    read: Tensor,
    suffix_keys: Tensor,
    suffix_values: Tensor,
    mask: Tensor,
    scale: float,
) -> Tensor:
    """Softmax over pinned rows, the rows `read [B, Hkv, Q, R]` and the suffix: like `query`."""
    group = query.shape[1] // read.shape[1]
    valid = mask.any(-1, keepdim=True)  # padding attends to nothing
    pinned = read.new_ones(*read.shape[:3], layer.pinned)
    recent = mask.expand(*read.shape[:2], -1, -1)
    seen = torch.cat([pinned & valid, read & valid, recent], -1)
    keys = joined(layer.keys, suffix_keys, group)
    values = joined(layer.values, suffix_values, group)
    seen = seen.repeat_interleave(group, 1)
    output = scaled_dot_product_attention(query, keys, values, seen, scale=scale)
    return output.masked_fill(~valid, 0.0)


def joined(context: Tensor, suffix: Tensor, group: int) -> Tensor:
    """Context `[Hkv, P, D]` and suffix `[B, Hkv, S, D]` for every head, `[B, Hq, P + S, D]`."""
    rows = torch.cat([context.expand(suffix.shape[0], -1, -1, -1), suffix], 2)
    return rows.repeat_interleave(group, 1)


def far_attention(
    queries: Queries,
    layer: ClusteredLayer,
    read: Tensor,
    far: FarField,
    suffix_keys: Tensor,
    suffix_values: Tensor,
    mask: Tensor,
) -> Tensor:
    """The same with a far field in the softmax, `[B, Hkv, G, Q, D]` in the queries' precision."""
    q, dtype = queries.q, queries.q.dtype
    context = queries.logits(layer.keys)
    context[..., layer.pinned :].masked_fill_(~read.unsqueeze(2), NEG_INF)
    context = context.masked_fill(~queries.valid[:, None, None, :, None], NEG_INF)
    recent = queries.scale * torch.einsum("bhgqd,bhsd->bhgqs", q, suffix_keys.to(dtype))
    recent = recent.masked_fill(~mask[:, :, None], NEG_INF)
    weights = softmax_or_nothing(torch.cat([context, far[0], recent], -1))
    near, distant, last = weights.split([context.shape[-1], far[0].shape[-1], recent.shape[-1]], -1)
    output = torch.einsum("bhgqp,hpd->bhgqd", near, layer.values.to(dtype))
    output += torch.einsum("bhgqf,hfd->bhgqd", distant, far[1].to(dtype))
    return output + torch.einsum("bhgqs,bhsd->bhgqd", last, suffix_values.to(dtype))


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


def rows_of(kept: Tensor, owner: Tensor) -> Tensor:
    """Spread kept nodes `[B, Hkv, N, C]` to their rows `[B, Hkv, N, R]`; `owner` is `[Hkv, R]`."""
    batch, _, blocks, _ = kept.shape
    return kept.gather(3, owner[None, :, None].expand(batch, -1, blocks, -1))


def document_rank(layer: ClusteredLayer) -> Tensor:
    """Place in the document of every row behind the pinned ones, from 0 to R - 1, `[Hkv, R]`."""
    return layer.positions[:, layer.pinned :].argsort(-1).argsort(-1)
