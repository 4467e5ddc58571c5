"""Rules tried out on observed queries: how far is their output from dense attention?

The exact attention of a sample of queries is computed once; then every rule's share of it, and what
stands for the rest, are compared with the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from squeezed.attention.scores import far_means, owners
from squeezed.attention.walk import scored_levels
from squeezed.config import FarField, TrialConfig
from squeezed.context.captured import ObservedLayer
from squeezed.context.layers import ClusteredLayer
from squeezed.indexing.products import float_product, kept_products

CHUNK_LOGITS = 1 << 27
"""Most exact logits held at once."""


@dataclass(frozen=True)
class Trials:
    """What the trials of one layer found.

    Attributes:
        errors: `[S, Hkv]` float64, mean squared error of the outputs of a KV head's group under
            every rule.
        norms: `[Hq]` float64, mean squared dense output.
        far_alpha: `[Hq]` float32, or `None` if the far field is not of second order.
    """

    errors: Tensor
    norms: Tensor
    far_alpha: Tensor | None


def try_out(
    seen: ObservedLayer,
    alpha: Tensor | None,
    thresholds: Tensor,
    far_field: FarField,
    config: TrialConfig,
) -> Trials:
    """Try `S` rules that differ in their thresholds on a sample of the queries.

    To second order a dropped node's mass is `N exp(s q.c + alpha (s |q|)^2 v / 2)`, with the alpha
    of the leaves. In most heads that is what its keys weigh. In some, a few keys of a cluster hold
    nearly all of its mass: then the estimate is right about the mass and wrong about the value. So
    every query head takes the part of alpha with which its output under rule `far_fitted_at` comes
    nearest to dense.

    Args:
        alpha: `[L, Hq]`, or `None` to first order.
        thresholds: `[S, L, Hkv]` log thresholds.
    """
    layer, step = seen.layer, max(1, seen.queries.shape[1] // config.queries)
    heads = layer.kv_heads
    queries = seen.queries[:, ::step].unflatten(0, (heads, -1))  # [Hkv, G, n, D]
    at_once = max(1, CHUNK_LOGITS // (queries[0, ..., 0].numel() * layer.tokens))
    errors, norms, parts = [], [], []
    for first in range(0, heads, at_once):
        own = slice(first, first + at_once)
        weights = None if alpha is None else alpha.unflatten(1, (heads, -1))[:, own].flatten(1)
        trial = _Trial(queries[own], layer.of_heads(own), weights, seen.scale)
        trial.select(thresholds[:, :, own])
        trial.read()
        part = (
            trial.part(config.far_fitted_at, config.far_parts)
            if far_field == "second_order"
            else None
        )
        errors.append(trial.errors(far_field, part))
        norms.append(trial.dense.square().sum(-1).mean(-1).flatten())
        parts += [] if part is None else [part.flatten()]
    of_heads = torch.cat(errors, 1).double().unflatten(1, (heads, -1)).sum(-1)
    far_alpha = None if alpha is None or not parts else alpha[-1] * torch.cat(parts)
    return Trials(of_heads, torch.cat(norms).double(), far_alpha)


class _Trial:
    """Some queries `[Hkv, G, n, D]`, their exact attention over the context alone, and rules.

    Attributes:
        kept, dropped: `[S, Hkv, n, C]` and `[S, Hkv, n, F]` bool, leaves that every rule reads and
            nodes of all levels that it drops.
        logits, second: `[Hkv, G, n, F]`, the nodes' log mass to first order over the largest exact
            logit, and the term of second order.
        dense: `[Hkv, G, n, D]`, the exact output.
        near: what every rule reads, weighted values `[Hkv, S, G, n, D]` and weights.
        shift: `[Hkv, 1, G, n, D]`, how far a query moves the value of a node of variance 1.
    """

    def __init__(self, queries: Tensor, layer: ClusteredLayer, alpha: Tensor | None, scale: float):
        self.queries, self.layer, self.alpha, self.scale = queries, layer, alpha, scale

    def select(self, thresholds: Tensor) -> None:
        """Select by every rule, `thresholds [S, L, Hkv]`, on all levels."""
        q = self.queries.float()[None]
        logits, dropped = [], []
        for found in scored_levels(q, self.layer, self.alpha):
            best = found.log_scores.amax(2)  # [1, Hkv, n, C]
            kept = found.alive & (best > thresholds[:, found.depth, :, None, None])
            found.opened = kept
            logits.append(found.log_mass[0])
            dropped.append(found.alive & ~kept)
        self.kept, self.dropped = kept, torch.cat(dropped, -1)
        self.logits = torch.cat(logits, -1)
        means, variance = far_means(self.layer, torch.float32)
        self.summed = torch.cat(
            [means, torch.ones_like(variance)[..., None], variance[..., None]], -1
        )
        if self.alpha is not None:
            energy = (0.5 * self.scale**2) * q[0].square().sum(-1, keepdim=True)
            alpha = self.alpha[-1].view(*q.shape[1:3], 1, 1)
            self.second = alpha * energy * variance[:, None, None]
        slope = torch.bmm(q[0].flatten(1, 2), self.layer.value_slope.float().mT)
        self.shift = self.scale * slope.view_as(q[0])[:, None]

    def read(self) -> None:
        """Exact attention to all keys, and to those that every rule keeps."""
        layer, rows = self.layer, self.queries.flatten(1, 2)  # [Hkv, G * n, D]
        # On a GPU in the precision of the values: what rounding adds is far below any error here.
        values = layer.values if layer.values.is_cuda else layer.values.float()
        logits = float_product(rows, layer.keys.mT).mul_(self.scale)
        peak = logits.amax(-1, keepdim=True)
        weights = logits.sub_(peak).exp_().to(values.dtype)
        self.logits -= peak.view(*self.queries.shape[:3], 1)
        owner = owners(layer.levels[-1].key_offsets, layer.tokens)[:, layer.pinned :]
        front, behind = weights.split([layer.pinned, layer.clustered], -1)
        near = kept_products(behind, values[:, layer.pinned :], owner, self.kept)
        pinned = float_product(front, values[:, : layer.pinned])
        mass = front.sum(-1, keepdim=True, dtype=torch.float32)
        output, mass = (
            (some + always[:, None]).unflatten(2, self.queries.shape[1:3])
            for some, always in zip(near, (pinned, mass), strict=True)
        )
        self.dense = output[:, -1] / mass[:, -1]
        self.near = output[:, :-1], mass[:, :-1]

    def errors(self, far_field: FarField, part: Tensor | None) -> Tensor:
        """Mean squared distance from dense of every rule, `[S, Hq]`."""
        if far_field == "none":
            return self._distance(*self.near)
        logits = self.logits if part is None else torch.addcmul(self.logits, part, self.second)
        weights = logits.exp()[:, None] * self.dropped.transpose(0, 1)[:, :, None]
        return self._distance(*self._with_far(self.near, weights, part is not None))

    def part(self, rule: int, known: tuple[float, ...]) -> Tensor:
        """The known part with the least error of each query head, `[Hkv, G, 1, 1]`."""
        parts = _placed(known, self.queries.device)
        logits = torch.addcmul(self.logits[:, None], parts.view(-1, 1, 1, 1), self.second[:, None])
        weights = logits.exp_() * self.dropped[rule][:, None, None]
        near = tuple(of_rules[:, rule, None] for of_rules in self.near)
        best = self._distance(*self._with_far(near, weights, True)).argmin(0)
        return parts[best].view(*self.queries.shape[:2], 1, 1)

    def _with_far(
        self, near: tuple[Tensor, Tensor], weights: Tensor, moves: bool
    ) -> tuple[Tensor, Tensor]:
        """Weighted values and weights with those of dropped nodes, `weights [Hkv, S, G, n, F]`."""
        sums = torch.bmm(weights.flatten(1, 3), self.summed).unflatten(1, weights.shape[1:4])
        far, mass, moved = sums.split([self.summed.shape[2] - 2, 1, 1], -1)
        output = near[0] + far
        return torch.addcmul(output, moved, self.shift) if moves else output, near[1] + mass

    def _distance(self, output: Tensor, mass: Tensor) -> Tensor:
        """Mean squared distance from dense, `[S, Hq]`, from `[Hkv, S, G, n, D]` and weights."""
        away = (output / mass - self.dense[:, None]).square().sum(-1).mean(-1)
        return away.transpose(0, 1).flatten(1)


@cache
def _placed(parts: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers on a device: copied once, for each copy waits for the device."""
    return torch.tensor(parts, device=device)
