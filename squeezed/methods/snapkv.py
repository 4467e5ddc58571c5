"""SnapKV: the queries of a probe vote once for the keys that stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from squeezed.context.layers import ClusteredLayer
from squeezed.context.record import ContextRecord
from squeezed.errors import SqueezedError
from squeezed.methods.base import Blocks
from squeezed.methods.fixed import FixedLayer
from squeezed.methods.masked import document_rank, top_rows

POOL_TOKENS = 7  # the paper's kernel


def votes(layer: ClusteredLayer, observed: Tensor, pool: int) -> Tensor:
    """Attention mass that the observation window gives to every row, pooled, `[Hkv, R]`.

    Args:
        observed: `[Hq, W, D]`, queries of `W` tokens after the document.
        pool: odd number of neighbouring tokens over which the largest vote counts.
    """
    heads = layer.kv_heads
    queries = observed.float().unflatten(0, (heads, -1))
    logits = layer.scale * torch.einsum("hgwd,hpd->hgwp", queries, layer.keys.float())
    weights = logits.softmax(-1)[..., layer.pinned :]
    mass = weights.sum(2).mean(1)  # [Hkv, R]
    order = document_rank(layer)
    in_document = torch.zeros_like(mass).scatter(1, order, mass)
    pooled = max_pool1d(in_document[:, None], pool, stride=1, padding=pool // 2)[:, 0]
    return pooled.gather(1, order)


@dataclass(frozen=True)
class SnapKV:
    """A fixed set of keys per KV head, chosen by the observation window's votes.

    Differences: the window is a probe, a general question after the document, because the document
    is compressed before any real one exists (the paper's window holds it); the heads of a group
    vote together.
    """

    name = "snapkv"
    paper = "https://arxiv.org/abs/2404.14469"

    pool_tokens: int = POOL_TOKENS

    def prepare(self, context: ContextRecord, budget: float) -> list[FixedLayer]:
        if len(context.observed) != len(context.clustered_layers):
            raise SqueezedError(
                "snapkv: expected a context that holds its observed queries, got one without; "
                "index the document again"
            )
        layers = []
        for layer, observed in zip(context.clustered_layers, context.observed, strict=True):
            chosen = torch.zeros_like(layer.positions[:, layer.pinned :], dtype=torch.bool)
            if layer.clustered:
                mass = votes(layer, observed, self.pool_tokens)
                chosen = top_rows(mass, round(budget * layer.clustered))
            layers.append(FixedLayer(layer, budget, Blocks.of(context), chosen))
        return layers
