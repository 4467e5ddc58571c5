"""Rules tried out on observed queries: how far is their output from dense attention?

The exact attention of a sample of queries is computed once; then every rule's share of it, and what
stands for the rest, are compared with the whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from squeezed.config import FarField
from squeezed.ops.long_product import long_product
from squeezed.ops.reference.lookup import (
    far_means,
    log_normaliser,
    log_sizes,
    node_logits,
    owners,
    second_order,
)
from squeezed.thresholds import ObservedLayer
from squeezed.tree import ClusteredLayer

TRIAL_QUERIES = 24  # observed queries per head

FAR_PARTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Parts of `alpha` that the mass of dropped nodes may get."""

CHUNK_LOGITS = 1 << 27
"""Most exact logits held at once."""


@dataclass(frozen=True)
class Trials:
    """What the trials of one layer found.

    Attributes:
        errors: `[S, Hkv]` float64, mean squared error of the outputs of a KV head's group under
            every rule, over the mean squared output of the layer's heads.
        far_alpha: `[Hq]` float32, or `None` if the far field is not of second order.
    """

    errors: Tensor
    far_alpha: Tensor | None


def try_out(
    seen: ObservedLayer,
    alpha: Tensor | None,
    thresholds: Tensor,
    far_field: FarField,
    fitted_at: int,
) -> Trials:
    """Try `S` rules that differ in their thresholds on a sample of the queries.

    To second order a dropped node's mass is `N exp(s q.c + alpha (s |q|)^2 v / 2)`, with the alpha
    of the leaves. In most heads that is what its keys weigh. In some, a few keys of a cluster hold
    nearly all of its mass: then the estimate is right about the mass and wrong about the value. So
    every query head takes the part of alpha with which its output under rule `fitted_at` comes
    nearest to dense.

    Args:
        alpha: `[L, Hq]`, or `None` to first order.
        thresholds: `[S, L, Hkv]` log thresholds.
    """
    layer, step = seen.layer, max(1, seen.queries.shape[1] // TRIAL_QUERIES)
    heads = layer.keys.shape[0]
    queries = seen.queries[:, ::step].float().unflatten(0, (heads, -1))[None]  # [1, Hkv, G, n, D]
    at_once = max(1, CHUNK_LOGITS // (queries[:, 0].numel() // queries.shape[-1] * layer.tokens))
    errors, norms, parts = [], [], []
    for first in range(0, heads, at_once):
        own = slice(first, first + at_once)
        weights = None if alpha is None else alpha.unflatten(1, (heads, -1))[:, own].flatten(1)
        trial = _Trial(queries[:, own], layer.of_heads(own), weights, seen.scale)
        trial.walk(thresholds[:, :, own])
        part = trial.part(fitted_at) if far_field == "second_order" else None
        found = [trial.error(rule, far_field, part) for rule in range(len(thresholds))]
        errors.append(torch.stack(found))
        norms.append(trial.dense.square().sum(-1).mean(-1).flatten())
        parts += [] if part is None else [part.flatten()]
    relative = torch.cat(errors, 1).double() / torch.cat(norms).double().mean()
    far_alpha = alpha[-1] * torch.cat(parts) if parts else None
    return Trials(relative.unflatten(1, (heads, -1)).sum(-1), far_alpha)


class _Trial:
    """Some queries `[1, Hkv, G, n, D]`, their exact attention over the context alone, and rules.

    Attributes:
        dense: `[1, Hkv, G, n, D]`, the exact output.
        kept: `[S, Hkv, n, R]` bool, rows behind the pinned ones that every rule reads.
        dropped: `[S, Hkv, n, F]` bool, nodes of all levels.
        logits, second: `[1, Hkv, G, n, F]`, the nodes' log mass to first order over `top`, and the
            term of second order.
    """

    def __init__(self, q: Tensor, layer: ClusteredLayer, alpha: Tensor | None, scale: float):
        self.q, self.layer, self.alpha, self.scale = q, layer, alpha, scale
        # On a GPU in the precision of the values: what rounding adds is far below any error here.
        self.values = layer.values if layer.values.is_cuda else layer.values.float()
        logits = scale * torch.einsum("bhgqd,hpd->bhgqp", q, layer.keys.float())
        self.top = logits.amax(-1, keepdim=True)
        self.weights = logits.sub_(self.top).exp_().to(self.values.dtype)
        output, mass = self._sum(self.weights, self.values)
        self.dense = output / mass
        pinned = slice(layer.pinned)
        self.pinned = self._sum(self.weights[..., pinned], self.values[:, pinned])

    def _sum(self, weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted values `[1, Hkv, G, n, D]` and sum of weights, float32."""
        heads, group = weights.shape[1:3]
        total = long_product(weights[0].flatten(1, 2), values.to(weights.dtype))
        total = total.view(1, heads, group, -1, values.shape[-1])
        return total, weights.sum(-1, keepdim=True, dtype=torch.float32)

    def walk(self, thresholds: Tensor) -> None:
        """Select by every rule, `thresholds [S, L, Hkv]`, on all levels at once."""
        alive = normaliser = None
        logits, dropped = [], []
        for depth, level in enumerate(self.layer.levels):
            first = node_logits(self.q, level, self.scale)
            alpha = None if self.alpha is None else self.alpha[depth]
            score = second_order(first, self.q, level, alpha, self.scale)
            if normaliser is None:
                normaliser = log_normaliser(score, level.sizes)
            best = (score - normaliser).amax(2)  # [1, Hkv, n, C]
            filled = (level.sizes > 0)[None, :, None]
            alive = filled if alive is None else alive & filled
            kept = alive & (best > thresholds[:, depth, :, None, None])
            logits.append(first + log_sizes(level.sizes, first) - self.top)
            dropped.append(alive & ~kept)
            finer, rows = level.child_offsets, self.layer.tokens
            members = level.key_offsets if finer is None else finer
            count = rows if finer is None else self.layer.levels[depth + 1].nodes
            owner = owners(members, count)[:, self.layer.pinned if finer is None else 0 :]
            alive = kept.gather(3, owner[None, :, None].expand(*kept.shape[:3], -1))
        self.kept, self.dropped = alive, torch.cat(dropped, -1)
        self.logits = torch.cat(logits, -1)
        self.means, variance = far_means(self.layer, torch.float32)
        self.variance = variance[None, :, None, None]
        if self.alpha is not None:
            energy = (0.5 * self.scale**2) * self.q.square().sum(-1, keepdim=True)
            alpha = self.alpha[-1].view(1, *self.q.shape[1:3], 1, 1)
            self.second = alpha * energy * self.variance

    def error(self, rule: int, far_field: FarField, part: Tensor | None) -> Tensor:
        """Mean squared distance from dense of one rule, `[Hq]`."""
        return self._distance(self._near(rule), rule, far_field, part)

    def part(self, rule: int) -> Tensor:
        """The one of `FAR_PARTS` with the least error of each query head, `[1, Hkv, G, 1, 1]`."""
        near, ones = self._near(rule), torch.ones_like(self.top[:, :, :, :1])
        errors = [self._distance(near, rule, "second_order", p * ones) for p in FAR_PARTS]
        best = torch.stack(errors).argmin(0)
        return self.top.new_tensor(FAR_PARTS)[best].view_as(ones)

    def _near(self, rule: int) -> tuple[Tensor, Tensor]:
        read = self.kept[rule][None, :, None].to(self.weights.dtype)
        behind = slice(self.layer.pinned, None)
        output, mass = self._sum(self.weights[..., behind] * read, self.values[:, behind])
        return output + self.pinned[0], mass + self.pinned[1]

    def _distance(
        self, near: tuple[Tensor, Tensor], rule: int, far_field: FarField, part: Tensor | None
    ) -> Tensor:
        output, mass = near
        if far_field != "none":
            far, far_mass, spread = self._far(rule, part)
            output, mass = output + far, mass + far_mass
            if part is not None:
                slope = self.layer.value_slope.float()
                output = output + spread * torch.einsum(
                    "bhgqe,hde->bhgqd", self.scale * self.q, slope
                )
        return (output / mass - self.dense).square().sum(-1).mean(-1).flatten()

    def _far(self, rule: int, part: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted mean values, weights and weighted variances of the dropped nodes."""
        logits = self.logits if part is None else torch.addcmul(self.logits, part, self.second)
        weights = logits.exp() * self.dropped[rule][None, :, None]
        output, mass = self._sum(weights, self.means)
        return output, mass, (weights * self.variance).sum(-1, keepdim=True)
