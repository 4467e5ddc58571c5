"""Thresholds spend the budget they promise; alpha recovers a variance that explains the mass."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from trees import random_layer

from squeezed.attention.reference.lookup import lookup
from squeezed.config import BEST, PAPER, HistogramConfig
from squeezed.context.calibration import interpolate
from squeezed.context.captured import ObservedLayer
from squeezed.indexing.calibrate import calibrate
from squeezed.indexing.forest import Forest
from squeezed.indexing.second_order import fit_alpha
from squeezed.indexing.thresholds import fit_thresholds, keep_shares
from squeezed.testing.layers import tree_over

BUDGETS = (0.05, 0.1, 0.3)
PRUNED_TOGETHER = replace(BEST, name="pruned together", per_head=False)
SCALE = 0.2


def observed(layers=3, tokens=1500, heads=4, nodes=(20, 100), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        ObservedLayer(
            random_layer(tokens=tokens, nodes=nodes, seed=seed + i, scale=SCALE),
            torch.randn(heads, 100, 32, generator=generator) * (1 + i),
        )
        for i in range(layers)
    ]


def spent(seen, calibration, budget, block):
    read = total = 0
    for index, layer in enumerate(seen):
        rule = calibration.rule(index, budget, block)
        found = lookup(layer.queries[None], layer.layer, rule)
        sizes = layer.layer.levels[-1].sizes
        read += float(torch.einsum("bhnc,hc->", found.kept.double(), sizes.double()))
        total += found.kept.shape[2] * layer.layer.clustered * sizes.shape[0]
    return read / total


def shares_kept(found, seen):
    """Share of its keys that each KV head reads, `[Hkv]`."""
    sizes = seen.layer.levels[-1].sizes
    read = torch.einsum("bhnc,hc->h", found.kept.double(), sizes.double())
    return read / (found.kept.shape[2] * seen.layer.clustered)


@pytest.mark.parametrize("nodes", [(20, 100), (5, 25, 150)], ids=len)
@pytest.mark.parametrize("preset", [PAPER, BEST, PRUNED_TOGETHER], ids=lambda preset: preset.name)
@pytest.mark.parametrize("block", [False, True])
def test_thresholds_spend_the_budget_on_what_they_observed(preset, block, nodes):
    seen = observed(nodes=nodes)
    calibration = calibrate(Forest.of(seen), preset, BUDGETS)
    for budget in BUDGETS:
        assert spent(seen, calibration, budget, block) == pytest.approx(budget, rel=0.08)


def test_between_the_grid_more_budget_reads_more():
    seen = observed()
    calibration = calibrate(Forest.of(seen), BEST, BUDGETS)
    shares = [spent(seen, calibration, b, False) for b in (0.02, 0.05, 0.07, 0.1, 0.2, 0.6, 1.0)]
    assert shares == sorted(shares) and shares[2] == pytest.approx(0.07, rel=0.25)
    assert shares[-1] == 1.0


def test_one_threshold_lets_a_sharp_layer_read_less():
    seen = observed()
    calibration = calibrate(Forest.of(seen), PAPER, BUDGETS)
    first, last = (calibration.rule(i, 0.1, False).log_thresholds for i in (0, 2))
    assert first.equal(last) and first.equal(first[:, :1].expand_as(first))
    shares = [spent(seen[i : i + 1], calibration, 0.1, False) for i in (0, 2)]
    assert shares[0] != pytest.approx(shares[1], rel=0.05)


def test_a_head_that_errs_more_gets_more_of_the_keys():
    seen = observed()
    calm = replace(seen[0], queries=seen[0].queries * 0)  # weighs all keys alike: means suffice
    calibration = calibrate(Forest.of([calm, seen[2]]), BEST, BUDGETS)
    shares = []
    for index, layer in enumerate([calm, seen[2]]):
        rule = calibration.rule(index, 0.1, False)
        shares.append(shares_kept(lookup(layer.queries[None], layer.layer, rule), layer))
    assert shares[0].max() < 0.5 * shares[1].min()


def test_a_head_without_a_share_still_reads_what_beats_all_it_was_asked():
    seen = observed(layers=2)
    quiet = replace(seen[0], queries=seen[0].queries * 0)  # all its clusters score alike
    calibration = calibrate(Forest.of([quiet, seen[1]]), BEST, BUDGETS)
    rule = calibration.rule(0, BUDGETS[0], False)
    found = lookup(10 * seen[0].queries[None], quiet.layer, rule)
    assert found.kept.any()


@pytest.mark.parametrize("preset", [PAPER, PRUNED_TOGETHER], ids=lambda preset: preset.name)
def test_thresholds_of_a_block_size_do_not_depend_on_the_others(preset):
    seen = observed()
    alpha = [fit_alpha(layer, 24) for layer in seen]
    both = fit_thresholds(seen, alpha, preset, BUDGETS, (1, 64), HistogramConfig())
    assert not any(grid[0].equal(grid[1]) for grid in both)
    for place, block in enumerate((1, 64)):
        alone = fit_thresholds(seen, alpha, preset, BUDGETS, (block,), HistogramConfig())
        assert all(one[0].equal(grid[place]) for one, grid in zip(alone, both, strict=True))


def test_a_document_too_short_to_cluster_has_no_thresholds():
    seen = [replace(layer, layer=replace(layer.layer, levels=())) for layer in observed()]
    for preset in (PAPER, BEST):
        assert calibrate(Forest.of(seen), preset, BUDGETS).rule(
            2, 0.1, True
        ).log_thresholds.shape == (0, 2)


def slope(seen, level, query_head):
    """Alpha of a level and query head straight from its definition, in float64."""
    head = query_head // (len(seen.queries) // len(seen.layer.keys))
    keys, offsets = seen.layer.keys[head].double(), level.key_offsets[head].tolist()
    queries = SCALE * seen.queries[query_head, ::4].double()
    sizes = level.sizes[head].double()
    first = level.centroids[head].double() @ queries.T
    mean = [(keys[a:b] @ queries.T).exp().mean(0) for a, b in pairwise(offsets)]
    mass = torch.stack(mean).nan_to_num(0.0)
    term = 0.5 * level.variance[head].double()[:, None] * queries.square().sum(-1)
    weight = (mass * sizes[:, None] / (mass * sizes[:, None]).sum(0)).sqrt()
    excess = (mass.log() - first).masked_fill(sizes[:, None] == 0, 0.0)
    return float((weight * term * excess).sum() / (weight * term * term).sum())


@pytest.mark.parametrize("keys_at_once", [1, 1 << 19])
def test_alpha_of_every_level_is_the_slope_over_its_own_keys(keys_at_once, monkeypatch):
    monkeypatch.setattr("squeezed.indexing.second_order.CHUNK_KEYS", keys_at_once)
    (seen,) = observed(layers=1, nodes=(5, 20, 100))
    alpha = fit_alpha(seen, 24)
    for depth, level in enumerate(seen.layer.levels):
        for head in range(len(seen.queries)):
            assert float(alpha[depth, head]) == pytest.approx(slope(seen, level, head), rel=1e-4)


def test_alpha_is_one_for_gaussian_clusters():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(1, 8, 32, generator=generator).repeat_interleave(500, 1)
    keys = centres + 0.8 * torch.randn(1, 4000, 32, generator=generator)
    offsets = torch.arange(0, 4001, 500, dtype=torch.int32)[None]
    layer = tree_over(keys, keys, offsets, [], keys.new_zeros(1, 32, 32), SCALE)
    queries = torch.randn(2, 100, 32, generator=generator)
    alpha = fit_alpha(ObservedLayer(layer, queries), 24)
    torch.testing.assert_close(alpha, torch.ones(1, 2), atol=0.15, rtol=0)


def test_coarser_levels_keep_more_and_paper_prunes_nothing():
    budgets = torch.tensor([0.025, 0.1])
    assert keep_shares(PAPER, budgets, 3).equal(torch.tensor([[1, 1, 0.025], [1, 1, 0.1]]))
    coarse, middle, fine = keep_shares(BEST, budgets, 3).unbind(-1)
    assert (coarse <= 1).all() and (coarse > middle).all() and (middle > fine).all()
    assert fine.equal(budgets)


def test_interpolation_meets_the_grid_and_ends_at_everything():
    grid = torch.tensor([[[-3.0]], [[-4.0]], [[float("-inf")]]], dtype=torch.float64)
    assert interpolate((0.1, 0.2, 0.4), grid, 0.2).tolist() == [[-4.0]]
    assert -4.0 < float(interpolate((0.1, 0.2, 0.4), grid, 0.15)) < -3.0
    assert interpolate((0.1, 0.2, 0.4), grid, 0.3).tolist() == [[float("-inf")]]
    assert interpolate((0.1, 0.2, 0.4), grid, 1.0).tolist() == [[float("-inf")]]
