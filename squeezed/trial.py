"""A rule tried out on observed queries: how far is its output from dense attention?"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from squeezed.ops.reference.attention import rows_read, tilt
from squeezed.ops.reference.lookup import grouped, lookup
from squeezed.rule import SelectionRule
from squeezed.thresholds import ObservedLayer
from squeezed.tree import ClusteredLayer

TRIAL_QUERIES = 24  # observed queries per head

FAR_PARTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Parts of `alpha` that the mass of dropped nodes may get."""

CHUNK_LOGITS = 1 << 25
"""Most exact logits held at once."""


@dataclass(frozen=True)
class Trials:
    """What the trials of one layer found.

    Attributes:
        errors: `[S, Hkv]` float64, mean squared error of the outputs of a KV head's group for
            every share of the keys, over the mean squared output of the layer's heads.
        far_alpha: `[Hq]` float32, or `None` if the far field is not of second order.
    """

    errors: Tensor
    far_alpha: Tensor | None


def try_out(seen: ObservedLayer, rules: list[SelectionRule], fitted_at: int) -> Trials:
    """Try every rule, all of one preset with the same `alpha`, on a sample of the queries.

    To second order a dropped node's mass is `N exp(s q.c + alpha (s |q|)^2 v / 2)`. In most heads
    that is what its keys weigh. In some, a few keys of a cluster hold nearly all of its mass: then
    the estimate is right about the mass and wrong about the value. So every query head takes the
    part of `alpha` with which its output under rule `fitted_at` comes nearest to dense.
    """
    layer, step = seen.layer, max(1, seen.queries.shape[1] // TRIAL_QUERIES)
    queries, heads = seen.queries[:, ::step], seen.layer.keys.shape[0]
    group = queries.shape[0] // heads
    at_once = max(1, CHUNK_LOGITS // (group * queries.shape[1] * layer.tokens))
    errors, norms, parts = [], [], []
    for first in range(0, heads, at_once):
        own = slice(first, first + at_once)
        some = ObservedLayer(
            _of_heads(layer, own), queries[own.start * group : own.stop * group], seen.scale
        )
        trial = _Trial(some)
        theirs = [_rule_of_heads(rule, own, group) for rule in rules]
        if theirs[0].far_field == "second_order":
            part = _best_part(trial, theirs[fitted_at])
            theirs = [replace(r, far_alpha=r.far_alpha * part) for r in theirs]
            parts.append(part)
        errors.append(torch.stack([trial.error(rule) for rule in theirs]))
        norms.append(trial.dense.square().sum(-1).mean(-1).flatten())
    found = torch.cat(errors, 1).double() / torch.cat(norms).double().mean()
    far_alpha = rules[0].far_alpha * torch.cat(parts) if parts else None
    return Trials(found.unflatten(1, (heads, group)).sum(-1), far_alpha)


class _Trial:
    """The exact attention of some queries over the context alone, and rules compared with it."""

    def __init__(self, seen: ObservedLayer) -> None:
        self.layer, self.scale, self.query = seen.layer, seen.scale, seen.queries[None].float()
        self.q = grouped(self.query, self.layer.keys.shape[0])
        logits = self.scale * torch.einsum("bhgqd,hpd->bhgqp", self.q, self.layer.keys.float())
        self.top = logits.amax(-1, keepdim=True)
        self.weights = logits.sub_(self.top).exp_()
        self.values = self.layer.values.float()
        self.dense = _weighted(self.weights, self.values) / self.weights.sum(-1, keepdim=True)

    def error(self, rule: SelectionRule) -> Tensor:
        """Mean squared distance from dense, `[Hq]`."""
        found = lookup(self.query, self.layer, rule, self.scale)
        weights = self.weights * rows_read(found, self.layer, rule, self.q.shape[3])
        output, mass = _weighted(weights, self.values), weights.sum(-1, keepdim=True)
        if rule.far_field != "none":
            far = (found.far_logits - self.top).exp_()
            output += _weighted(far, found.far_values)
            mass += far.sum(-1, keepdim=True)
        if rule.far_field == "second_order":
            output += tilt(far, found.far_variance, self.q, self.layer, self.scale)
        return (output / mass - self.dense).square().sum(-1).mean(-1).flatten()


def _best_part(trial: _Trial, rule: SelectionRule) -> Tensor:
    """The one of `FAR_PARTS` with the least error of each query head, `[Hq]`."""
    errors = [trial.error(replace(rule, far_alpha=rule.far_alpha * part)) for part in FAR_PARTS]
    return rule.far_alpha.new_tensor(FAR_PARTS)[torch.stack(errors).argmin(0)]


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    return torch.einsum("bhgqp,hpd->bhgqd", weights, values)


def _of_heads(layer: ClusteredLayer, own: slice) -> ClusteredLayer:
    """Some KV heads of a layer, as views."""
    levels = tuple(
        replace(level, **{name: tensor[own] for name, tensor in level.tensors().items()})
        for level in layer.levels
    )
    names = ("keys", "values", "positions", "value_slope")
    return replace(layer, levels=levels, **{name: getattr(layer, name)[own] for name in names})


def _rule_of_heads(rule: SelectionRule, own: slice, group: int) -> SelectionRule:
    wide = slice(own.start * group, own.stop * group)
    alpha, far_alpha = (None if a is None else a[..., wide] for a in (rule.alpha, rule.far_alpha))
    thresholds = rule.log_thresholds[:, own]
    return replace(rule, log_thresholds=thresholds, alpha=alpha, far_alpha=far_alpha)
