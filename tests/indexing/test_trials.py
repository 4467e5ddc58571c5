"""Trials measure what attention would do, and find the far field that errs least."""

from dataclasses import replace

import pytest
import torch
from trees import random_layer

from squeezed.attention.reference import attend
from squeezed.config import TrialConfig
from squeezed.context.captured import ObservedLayer
from squeezed.context.rule import SelectionRule
from squeezed.indexing import trials as trial

GROUP = 2
TRIALS = TrialConfig(far_fitted_at=1, far_parts=(0.0, 0.3, 0.6, 1.0))


def observed(tokens=900, nodes=(12, 60)):
    layer = random_layer(tokens=tokens, nodes=nodes)
    queries = 2 * torch.randn(2 * GROUP, 72, 32, generator=torch.Generator().manual_seed(3))
    return ObservedLayer(layer, queries)


def rules(far_field, thresholds=(-7.5, -6.8, -6.0)):
    alpha = torch.full((2, 2 * GROUP), 0.8)
    far_alpha = alpha[-1] if far_field == "second_order" else None
    return [
        SelectionRule(torch.tensor([[t - 0.5] * 2, [t] * 2]), alpha, far_field, 1, far_alpha)
        for t in thresholds
    ]


def tried_out(seen, tried):
    thresholds = torch.stack([rule.log_thresholds for rule in tried])
    return trial.try_out(seen, tried[0].alpha, thresholds, tried[0].far_field, TRIALS)


def errors_by_attention(seen, rule):
    """Mean squared error of the output by group, `[Hkv]`, and mean square of dense, `[Hq]`."""
    query = seen.queries[None, :, ::3]
    dense, output = (
        attend(query, layer, rule).output for layer in (replace(seen.layer, levels=()), seen.layer)
    )
    away, norm = (x.square().sum(-1).mean((0, 2)) for x in (output - dense, dense))
    return away.unflatten(0, (2, GROUP)).sum(1), norm


@pytest.mark.parametrize("chunk", [1, 1 << 25])
@pytest.mark.parametrize("far_field", ["none", "first_order"])
def test_errors_are_those_of_attention(far_field, chunk, monkeypatch):
    monkeypatch.setattr(trial, "CHUNK_LOGITS", chunk)
    seen, tried = observed(), rules(far_field)
    found = tried_out(seen, tried)
    assert found.far_alpha is None
    for of_share, rule in zip(found.errors, tried, strict=True):
        expected, norms = (x.double() for x in errors_by_attention(seen, rule))
        torch.testing.assert_close(of_share, expected, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(found.norms, norms, atol=1e-6, rtol=1e-4)


def test_every_head_takes_the_far_field_with_the_least_error():
    seen, tried = observed(), rules("second_order")
    found = tried_out(seen, tried)
    parts = (found.far_alpha / tried[0].far_alpha).tolist()
    assert all(min(abs(part - known) for known in TRIALS.far_parts) < 1e-6 for part in parts)
    chosen = [replace(rule, far_alpha=found.far_alpha) for rule in tried]
    expected = torch.stack([errors_by_attention(seen, rule)[0] for rule in chosen]).double()
    torch.testing.assert_close(found.errors, expected, atol=1e-6, rtol=1e-4)
    for part in TRIALS.far_parts:
        other = replace(tried[1], far_alpha=tried[1].far_alpha * part)
        assert (found.errors[1] <= errors_by_attention(seen, other)[0] * (1 + 1e-4)).all()
