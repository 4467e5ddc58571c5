"""Thresholds spend the budget they promise; alpha recovers a variance that explains the mass."""

import pytest
import torch
from trees import level_of, random_layer

from squeezed.calibration import calibrate, fit_alpha, interpolate
from squeezed.config import BEST, PAPER
from squeezed.ops.reference.lookup import lookup
from squeezed.thresholds import ObservedLayer, keep_shares, spent_shares
from squeezed.tree import ClusteredLayer

BUDGETS = (0.05, 0.1, 0.3)
SCALE = 0.2


def observed(layers=3, tokens=1500, heads=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        ObservedLayer(
            random_layer(tokens=tokens, nodes=(20, 100), seed=seed + i),
            torch.randn(heads, 100, 32, generator=generator) * (1 + i),
            SCALE,
        )
        for i in range(layers)
    ]


def spent(seen, calibration, budget, block):
    read = total = 0
    for index, layer in enumerate(seen):
        rule = calibration.rule(index, budget, block)
        found = lookup(layer.queries[None], layer.layer, rule, layer.scale)
        sizes = layer.layer.levels[-1].sizes
        read += float(torch.einsum("bhnc,hc->", found.kept.double(), sizes.double()))
        total += found.kept.shape[2] * layer.layer.clustered * sizes.shape[0]
    return read / total


def share_kept(found, seen):
    sizes = seen.layer.levels[-1].sizes
    read = float(torch.einsum("bhnc,hc->", found.kept.double(), sizes.double()))
    return read / (found.kept.shape[2] * seen.layer.clustered * sizes.shape[0])


@pytest.mark.parametrize("preset", [PAPER, BEST], ids=lambda preset: preset.name)
@pytest.mark.parametrize("block", [False, True])
def test_thresholds_spend_the_budget_on_what_they_observed(preset, block):
    seen = observed()
    calibration = calibrate(seen, preset, BUDGETS)
    for budget in BUDGETS:
        assert spent(seen, calibration, budget, block) == pytest.approx(budget, rel=0.08)


def test_between_the_grid_more_budget_reads_more():
    seen = observed()
    calibration = calibrate(seen, BEST, BUDGETS)
    shares = [spent(seen, calibration, b, False) for b in (0.02, 0.05, 0.07, 0.1, 0.2, 0.6, 1.0)]
    assert shares == sorted(shares) and shares[2] == pytest.approx(0.07, rel=0.25)
    assert shares[-1] == 1.0


def test_one_threshold_lets_a_sharp_layer_read_less():
    seen = observed()
    calibration = calibrate(seen, PAPER, BUDGETS)
    first, last = (calibration.rule(i, 0.1, False).log_thresholds for i in (0, 2))
    assert first == last
    shares = [spent(seen[i : i + 1], calibration, 0.1, False) for i in (0, 2)]
    assert shares[0] != pytest.approx(shares[1], rel=0.05)


def test_a_layer_of_best_gets_the_part_that_the_first_order_gives_it():
    seen = observed()
    own = calibrate(seen, BEST, BUDGETS)
    first = spent_shares(seen, [None] * 3, PAPER, BUDGETS, 1)
    second = spent_shares(seen, own.alpha, BEST, BUDGETS, 1)
    assert (second[2] < 0.8 * first[2]).any()  # else this test shows nothing
    for column, budget in enumerate(BUDGETS):
        wanted = first[:, column]
        assert float(wanted.mean()) == pytest.approx(budget, rel=0.05)
        for index, layer in enumerate(seen):
            rule = own.rule(index, budget, False)
            found = lookup(layer.queries[None], layer.layer, rule, SCALE)
            assert share_kept(found, layer) == pytest.approx(float(wanted[index]), rel=0.1)


def test_shares_of_layers_under_one_threshold_are_what_a_lookup_reads():
    seen = observed()
    calibration = calibrate(seen, PAPER, BUDGETS)
    shares = spent_shares(seen, calibration.alpha, PAPER, BUDGETS, 1)
    for index, layer in enumerate(seen):
        found = lookup(layer.queries[None], layer.layer, calibration.rule(index, 0.1, False), SCALE)
        assert share_kept(found, layer) == pytest.approx(float(shares[index, 1]), rel=0.05)


def test_alpha_is_one_for_gaussian_clusters():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(1, 8, 32, generator=generator).repeat_interleave(500, 1)
    keys = centres + 0.8 * torch.randn(1, 4000, 32, generator=generator)
    offsets = torch.arange(0, 4001, 500, dtype=torch.int32)[None]
    level = level_of(keys, keys, offsets, None)
    layer = ClusteredLayer(keys, keys, torch.zeros(1, 4000, dtype=torch.int32), 0, (level,))
    queries = torch.randn(2, 100, 32, generator=generator)
    alpha = fit_alpha(ObservedLayer(layer, queries, SCALE))
    torch.testing.assert_close(alpha, torch.ones(1, 2), atol=0.15, rtol=0)


def test_coarser_levels_keep_more_and_paper_prunes_nothing():
    assert keep_shares(PAPER, 0.1, 3) == [1.0, 1.0, 0.1]
    shares = keep_shares(BEST, 0.025, 3)
    assert 1.0 >= shares[0] > shares[1] > shares[2] == 0.025


def test_interpolation_meets_the_grid_and_ends_at_everything():
    grid = torch.tensor([[-3.0], [-4.0], [float("-inf")]], dtype=torch.float64)
    assert interpolate((0.1, 0.2, 0.4), grid, 0.2) == (-4.0,)
    assert -4.0 < interpolate((0.1, 0.2, 0.4), grid, 0.15)[0] < -3.0
    assert interpolate((0.1, 0.2, 0.4), grid, 0.3) == (float("-inf"),)
    assert interpolate((0.1, 0.2, 0.4), grid, 1.0) == (float("-inf"),)
