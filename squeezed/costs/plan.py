"""What a context of a given length would cost, from a model's configuration alone.

Every figure is arithmetic on shapes; nothing is run. "Decode" is one request that generates one
token; bytes are those of the context, and of the model's weights where it says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from numbers import Real

import torch

from squeezed.config import ClusteringConfig, Preset, RowsName, check_budget
from squeezed.context.bytes import LayerBytes
from squeezed.costs.shape import ModelShape
from squeezed.errors import SqueezedError, expect, whole
from squeezed.indexing.thresholds import keep_shares

LONGEST_CONTEXT = 10**12
"""Tokens; far beyond any memory, and far below what overflows."""

BANDWIDTHS = (1.0, 1e18)
"""Bytes per second for which times are worth printing."""


@dataclass(frozen=True)
class Plan:
    """The costs of one context; bytes and floating-point operations in sum over all layers.

    Attributes:
        rows: how keys and values are written; dense attention reads them plain.
        kv_bytes: keys and values of the context.
        index_bytes: held on top of them.
        clustering_flops: multiply-adds count as two.
        prefill_flops: of the document through the weights and dense causal attention.
        dense_bytes_per_token, squeezed_bytes_per_token: of the context, read per generated token.
        weight_bytes: read per generated token besides.
        attention_speedup: what those bytes allow attention over the context.
        token_speedup: the same for a whole token at batch 1, weights included.
        dense_ms, squeezed_ms: a whole token at `bandwidth` bytes per second; a lower bound.
    """

    shape: ModelShape
    tokens: int
    budget: float
    bandwidth: float
    kv_bytes: int
    index_bytes: int
    clustering_flops: int
    prefill_flops: int
    dense_bytes_per_token: int
    squeezed_bytes_per_token: int
    weight_bytes: int
    rows: RowsName = "plain"
    attention_speedup: float = field(init=False)
    token_speedup: float = field(init=False)
    dense_ms: float = field(init=False)
    squeezed_ms: float = field(init=False)

    def __post_init__(self) -> None:
        dense = self.dense_bytes_per_token + self.weight_bytes
        squeezed = self.squeezed_bytes_per_token + self.weight_bytes
        ratio = self.dense_bytes_per_token / self.squeezed_bytes_per_token
        object.__setattr__(self, "attention_speedup", ratio)
        object.__setattr__(self, "token_speedup", dense / squeezed)
        object.__setattr__(self, "dense_ms", 1e3 * dense / self.bandwidth)
        object.__setattr__(self, "squeezed_ms", 1e3 * squeezed / self.bandwidth)

    def record(self) -> dict:
        return asdict(self)


def plan(
    shape: ModelShape,
    tokens: int,
    budget: float,
    bandwidth: float,
    clustering: ClusteringConfig,
    preset: Preset,
    rows: RowsName = "plain",
) -> Plan:
    """Work out what a context of `tokens` costs at `budget`, on memory of `bandwidth` bytes/s.

    Raises:
        SqueezedError: a length or bandwidth that is not positive, or a budget outside (0, 1].
    """
    if whole("context", tokens, 1) > LONGEST_CONTEXT:
        raise SqueezedError(f"context: expected at most {LONGEST_CONTEXT:,} tokens, got {tokens}")
    low, high = BANDWIDTHS
    expect("bandwidth", bandwidth, Real, "bytes per second")
    if not low <= bandwidth <= high:
        raise SqueezedError(
            f"bandwidth: expected {low:g} to {high:g} bytes per second, got {bandwidth:g}"
        )
    check_budget(budget)
    nodes = clustering.counts(tokens)
    full = shape.full_layers * shape.kv_heads
    windowed = shape.window_layers * shape.kv_heads * min(tokens, shape.window)
    plain, parts = shape.bytes(), shape.bytes(rows if nodes else "plain")
    windowed_bytes = plain.keys(windowed)
    clustered = clustered_tokens(tokens, clustering) if nodes else 0
    dense_bytes = plain.keys(full * tokens) + windowed_bytes
    kv_bytes = full * (plain.keys(tokens - clustered) + parts.keys(clustered)) + windowed_bytes
    squeezed = full * _bytes_per_head(parts, tokens, budget, nodes, clustering, preset)
    return Plan(
        shape=shape,
        tokens=tokens,
        budget=budget,
        bandwidth=bandwidth,
        kv_bytes=kv_bytes,
        index_bytes=full * parts.index(tokens, nodes),
        clustering_flops=full * _clustering_flops_per_head(shape, tokens, nodes, clustering),
        prefill_flops=_prefill_flops(shape, tokens),
        dense_bytes_per_token=dense_bytes,
        squeezed_bytes_per_token=kv_bytes if budget == 1 else round(squeezed) + windowed_bytes,
        weight_bytes=shape.parameters * shape.element_bytes,
        rows=rows,
    )


def clustered_tokens(tokens: int, clustering: ClusteringConfig) -> int:
    return tokens - clustering.pinned(tokens)[1]


def _bytes_per_head(
    parts: LayerBytes,
    tokens: int,
    budget: float,
    nodes: Sequence[int],
    clustering: ClusteringConfig,
    preset: Preset,
) -> float:
    """Bytes that a decoding step reads of one KV head at `budget`.

    A level scores the children of what the level above kept, and replaces what it drops by a mean.
    """
    clustered = clustered_tokens(tokens, clustering) if nodes else 0
    read = parts.pinned(tokens - clustered) + parts.keys(budget * clustered)
    budgets = torch.tensor([budget], dtype=torch.float64)
    alive, shares = 1.0, keep_shares(preset, budgets, len(nodes))[0].tolist() if nodes else []
    for count, kept in zip(nodes, shares, strict=True):
        dropped = count * max(0.0, alive - kept)
        read += parts.nodes(count * alive, dropped, preset.second_order, preset.far_field)
        alive = kept
    if not nodes:
        return read
    return read + parts.opened(nodes[-1] * alive) + parts.slope(preset.far_field) + parts.turns()


def _clustering_flops_per_head(
    shape: ModelShape, tokens: int, nodes: Sequence[int], clustering: ClusteringConfig
) -> int:
    """Similarities of every key to the centroids of its own parent, in every pass of k-means."""
    passes, flops, above = clustering.iterations + 1, 0.0, 1
    for count in nodes:
        flops += 2 * clustered_tokens(tokens, clustering) * (count / above) * shape.head_dim
        above = count
    return round(passes * flops)


def _prefill_flops(shape: ModelShape, tokens: int) -> int:
    seen = shape.full_layers * tokens * (tokens + 1) // 2
    window = min(tokens, shape.window)
    seen += shape.window_layers * (tokens * window - window * (window - 1) // 2 if window else 0)
    return 2 * shape.parameters * tokens + 4 * shape.heads * shape.head_dim * seen
