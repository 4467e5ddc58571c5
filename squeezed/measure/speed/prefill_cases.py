"""Cases of the prefill benchmark: a context clustered for real, queries, a rule for the budget."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from squeezed.attention.interface import Suffix
from squeezed.attention.triton.prefill.launch import prefill
from squeezed.config import ClusteringConfig
from squeezed.context.layers import ClusteredLayer
from squeezed.context.rule import SelectionRule
from squeezed.indexing.clustering import cluster_layer
from squeezed.testing.parts import Parts
from squeezed.testing.rules import rule_for_shares

COARSE_SHARE = 1.25  # a level above the leaves keeps this times the square root of the budget


@dataclass(frozen=True)
class Case:
    """One line of the table: sizes in tokens, `budget` as the share of clustered keys read."""

    context: int
    rows: int
    heads: int
    kv_heads: int
    dim: int
    budget: float
    query_block: int


@dataclass(frozen=True)
class Inputs:
    """A clustered layer, the user's queries and the suffix they belong to."""

    layer: ClusteredLayer
    query: Tensor
    suffix: Suffix

    @staticmethod
    def of(case: Case, dtype: torch.dtype = torch.bfloat16) -> Inputs:
        parts = Parts.of(case.kv_heads, case.dim, "cuda")
        keys = parts.keys(case.context, dtype)
        layer = cluster_layer(keys, torch.randn_like(keys), ClusteringConfig())
        del keys
        query = parts.queries(case.rows, case.heads // case.kv_heads, dtype)
        recent = parts.keys(case.rows, dtype)[None]
        return Inputs(layer, query, Suffix.of(layer, recent, torch.randn_like(recent)))

    def first(self, rows: int) -> Inputs:
        """The same context under only the first `rows` user tokens."""
        query, keys, values = (
            x[:, :, :rows].contiguous() for x in (self.query, self.suffix.keys, self.suffix.values)
        )
        return replace(self, query=query, suffix=Suffix(keys, values))

    def head(self, index: int) -> Inputs:
        """KV head `index` and its group alone."""
        group = self.query.shape[1] // self.layer.keys.shape[0]
        one = slice(index, index + 1)
        query = self.query[:, index * group : (index + 1) * group]
        suffix = Suffix(self.suffix.keys[:, one], self.suffix.values[:, one])
        return Inputs(self.layer.of_heads(one), query, suffix)

    def arguments(self, rule: SelectionRule) -> tuple:
        return self.query, self.layer, rule, self.suffix

    def share_read(self, rule: SelectionRule) -> float:
        """Share of the clustered keys that a query reads, averaged over heads and queries."""
        heads, rows = self.layer.keys.shape[0], self.query.shape[2]
        read = int(prefill(*self.arguments(rule)).keys_read)
        return read / (self.layer.clustered * heads * rows)


def rule_for(inputs: Inputs, case: Case) -> SelectionRule:
    """Thresholds that spend the budget on these queries, the same for all heads."""
    coarse = min(1.0, COARSE_SHARE * case.budget**0.5)
    shares = [coarse] * (len(inputs.layer.levels) - 1) + [case.budget]
    return rule_for_shares(inputs.query, inputs.layer, shares, block=case.query_block)
