"""Shares by error: the budget is spent, and no other split of it errs less."""

import itertools

import pytest
import torch

from squeezed.config import AllotmentConfig, TrialConfig
from squeezed.indexing.allotment import allot

BUDGETS = (0.025, 0.1, 0.3)
SHARES = TrialConfig().shares
CONFIG = AllotmentConfig(first_layer_weight=2.0, least_share=0.5)


def curve(level, slope):
    """Errors `[len(SHARES), 1]` that fall as a power of the share."""
    return level * torch.tensor(SHARES, dtype=torch.float64)[:, None] ** -slope


def error_at(shares, level, slope):
    return level * shares**-slope


def test_shares_spend_the_budget_and_grow_with_it():
    generator = torch.Generator().manual_seed(0)
    errors = torch.rand(len(SHARES), 20, generator=generator).sort(0, descending=True).values
    shares = allot(errors, SHARES, torch.arange(20) // 4, BUDGETS, CONFIG)  # [budgets, N]
    assert shares.mean(1).tolist() == pytest.approx(BUDGETS, rel=1e-3)
    assert (shares.diff(dim=0) >= -1e-9).all() and (shares > 0).all() and (shares <= 1).all()


def test_heads_alike_share_alike():
    shares = allot(
        curve(1.0, 1.0).expand(-1, 6), SHARES, torch.zeros(6, dtype=torch.long), BUDGETS, CONFIG
    )
    assert shares.equal(shares[:, :1].expand_as(shares))


def test_no_other_split_of_the_budget_errs_less():
    heads = ((1.0, 1.0), (0.1, 1.0), (0.3, 0.5))
    errors = torch.cat([curve(*head) for head in heads], 1)
    shares = allot(errors, SHARES, torch.tensor([0, 0, 0]), (0.1,), CONFIG)
    found = sum(error_at(x, *head) for x, head in zip(shares[0], heads, strict=True))
    tried = torch.logspace(-2, -0.6, 60, dtype=torch.float64)
    best = min(
        sum(error_at(x, *head) for x, head in zip((a, b, 0.3 - a - b), heads, strict=True))
        for a, b in itertools.product(tried, tried)
        if 0.3 - a - b > 0.005
    )
    assert float(found) <= 1.03 * float(best)
    assert shares[0, 0] > shares[0, 1]


def test_an_error_that_rises_with_the_share_counts_as_flat():
    noisy = curve(1.0, 1.0)
    noisy[3] = noisy[2] * 1.5
    shares = allot(
        torch.cat([noisy, curve(1.0, 1.0)], 1), SHARES, torch.tensor([0, 0]), BUDGETS, CONFIG
    )
    assert shares.isfinite().all() and shares.mean(1).tolist() == pytest.approx(BUDGETS, rel=1e-3)


def test_the_first_layer_gets_more_than_another_with_the_same_errors():
    shares = allot(curve(1.0, 1.0).expand(-1, 2), SHARES, torch.tensor([0, 1]), (0.1,), CONFIG)
    assert shares[0, 0] > shares[0, 1]


def test_no_layer_falls_below_its_part_of_the_budget():
    errors = [curve(1.0, 1.0), curve(1e-9, 1.0).expand(-1, 3), curve(0.5, 0.5)]
    shares = allot(torch.cat(errors, 1), SHARES, torch.tensor([0, 1, 1, 1, 2]), BUDGETS, CONFIG)
    means = torch.stack([of_layer.mean(1) for of_layer in shares.split([1, 3, 1], 1)])
    budgets = torch.tensor(BUDGETS, dtype=torch.float64)
    assert means[1].tolist() == pytest.approx((CONFIG.least_share * budgets).tolist(), rel=0.06)
    assert (means >= CONFIG.least_share * budgets * (1 - 1e-9)).all()
    assert (shares.diff(dim=0) >= -1e-9).all()
    assert shares.mean(1).tolist() == pytest.approx(BUDGETS, rel=1e-3)
