"""`squeezed bench prefill`: user tokens over a long context, against the best dense attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import typer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from squeezed.bench.common import Timing, time_in_graph
from squeezed.bench.synthetic import Parts
from squeezed.clustering import cluster_layer
from squeezed.config import ClusteringConfig, FarField
from squeezed.ops.triton.prefill import attend
from squeezed.rule import SelectionRule
from squeezed.tree import ClusteredLayer

NEG_INF = float("-inf")


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
    far_field: FarField = "none"


@dataclass(frozen=True)
class Inputs:
    layer: ClusteredLayer
    query: Tensor
    suffix_keys: Tensor
    suffix_values: Tensor
    scale: float

    @staticmethod
    def of(case: Case, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Inputs:
        parts = Parts.of(case.kv_heads, case.dim, device)
        keys = parts.keys(case.context, dtype)
        values = torch.randn(keys.shape, device=device, generator=parts.generator).to(dtype)
        layer = cluster_layer(keys, values, ClusteringConfig())
        del keys, values
        query = parts.queries(case.rows, case.heads // case.kv_heads, dtype)
        suffix = parts.keys(case.rows, dtype)[None]
        return Inputs(layer, query, suffix, torch.randn_like(suffix), case.dim**-0.5)

    def attend(self, rule: SelectionRule) -> tuple[Tensor, Tensor]:
        return attend(
            self.query, self.layer, rule, self.suffix_keys, self.suffix_values, None, self.scale
        )

    def share_read(self, rule: SelectionRule) -> float:
        """Share of the clustered keys that a query reads, averaged over heads and queries."""
        heads, rows = self.layer.keys.shape[0], self.query.shape[2]
        return int(self.attend(rule)[1]) / (self.layer.clustered * heads * rows)


def rule_for(inputs: Inputs, case: Case) -> SelectionRule:
    """Thresholds that spend the budget: each level by bisection, the coarser one keeping more."""
    depth, found = len(inputs.layer.levels), []
    for level in range(depth):
        above = (1.25 * case.budget**0.5) if level < depth - 1 else case.budget
        low, high = -40.0, 5.0
        for _ in range(14):
            middle = (low + high) / 2
            thresholds = (*found, middle, *[NEG_INF] * (depth - level - 1))
            read = inputs.share_read(SelectionRule(thresholds, None, "none", case.query_block))
            low, high = (middle, high) if read > above else (low, middle)
        found.append(high)
    return SelectionRule(tuple(found), None, case.far_field, case.query_block)


def dense_times(inputs: Inputs) -> dict[str, Timing]:
    """Dense peers over context and suffix. cuDNN has no such causal mask: it runs without one."""
    keys = torch.cat([inputs.layer.keys[None], inputs.suffix_keys], 2)
    values = torch.cat([inputs.layer.values[None], inputs.suffix_values], 2)
    causal = causal_lower_right(inputs.query.shape[2], keys.shape[2])
    gqa = keys.shape[1] != inputs.query.shape[1]
    found = {}
    for name, backend, mask in (
        ("flash", SDPBackend.FLASH_ATTENTION, causal),
        ("cudnn, no mask", SDPBackend.CUDNN_ATTENTION, None),
    ):

        def step(backend=backend, mask=mask):
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    inputs.query, keys, values, attn_mask=mask, enable_gqa=gqa
                )

        try:
            found[name] = time_in_graph([step], replays=15)
        except RuntimeError as error:  # this build lacks the backend for this shape: say so
            typer.echo(f"{name}: {str(error).splitlines()[0]}", err=True)
    return found
