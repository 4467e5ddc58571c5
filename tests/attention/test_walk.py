"""The walk down the tree against its formulas in loops, and rules that spend what they are told."""

import math

import pytest
import torch
from trees import random_layer

from squeezed.attention.reference.lookup import lookup
from squeezed.attention.scores import grouped
from squeezed.attention.walk import scored_levels
from squeezed.testing.rules import rule_for_budget, rule_for_shares

NODES = (5, 12, 40)


@pytest.fixture(scope="module")
def layer():
    return random_layer(tokens=400, nodes=NODES)


def queries(rows=3, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, rows, 32, generator=generator)


@pytest.mark.parametrize("second", [False, True])
def test_scores_are_those_of_the_formula(layer, second):
    query = queries(rows=1, batch=1).double()
    alpha = torch.rand(3, 4, dtype=torch.float64) if second else None
    walked = list(scored_levels(grouped(query, 2), layer, alpha))
    for head, own in enumerate(query[0, :, 0]):
        kv, group = divmod(head, 2)

        def logit(level, node, own=own, kv=kv, head=head):
            found = layer.scale * float(own @ layer.levels[level].centroids[kv, node].double())
            if second:
                spread = float(layer.levels[level].variance[kv, node])
                found += (
                    float(alpha[level, head]) * (layer.scale * float(own.norm())) ** 2 / 2 * spread
                )
            return found

        sizes = layer.levels[0].sizes[kv].tolist()
        mass = sum(n * math.exp(logit(0, i)) for i, n in enumerate(sizes))
        for level in walked:
            of_head = level.log_scores[0, kv, group, 0]
            for node, size in enumerate(level.level.sizes[kv].tolist()):
                expected = logit(level.depth, node) - math.log(mass) if size else -math.inf
                assert float(of_head[node]) == pytest.approx(expected, rel=1e-9)
                if size:
                    plain = layer.scale * float(own @ level.level.centroids[kv, node].double())
                    found = float(level.log_mass[0, kv, group, 0, node])
                    assert found == pytest.approx(plain + math.log(size), rel=1e-9)


def test_filled_children_of_opened_nodes_are_alive_and_no_others(layer):
    generator = torch.Generator().manual_seed(2)
    parents = None
    for found in scored_levels(grouped(queries(), 2), layer):
        filled = (found.level.sizes > 0)[None, :, None].expand(2, 2, 3, -1)
        expected = filled if parents is None else filled & parents
        assert found.alive.expand(expected.shape).equal(expected)
        found.opened = found.alive & (torch.rand(expected.shape, generator=generator) < 0.6)
        if found.level.child_offsets is not None:
            counts = found.level.child_offsets.long().diff(dim=-1)
            heads = [found.opened[:, h].repeat_interleave(counts[h], -1) for h in range(2)]
            parents = torch.stack(heads, 1)
    assert found.depth == 2 and found.opened.any()


def test_a_walk_that_opens_nothing_by_itself_sees_all_nodes(layer):
    for found in scored_levels(grouped(queries(), 2), layer):
        assert found.alive.expand(2, 2, 1, -1)[0, :, 0].equal(found.level.sizes > 0)


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("second", [False, True])
def test_a_rule_for_shares_opens_them(layer, block, second):
    query = queries(rows=32)
    alpha = torch.rand(3, 4) if second else None
    shares = (0.8, 0.5, 0.2)
    rule = rule_for_shares(query, layer, shares, "second_order", alpha, block)
    kept = lookup(query, layer, rule).kept
    read = (kept * layer.levels[-1].sizes[:, None]).sum() / (kept[..., 0].numel() * layer.clustered)
    assert float(read) == pytest.approx(0.2, rel=0.02)
    assert rule.query_block == block and rule.far_alpha.tolist() == [0.5] * 4
    wide = rule_for_shares(query, layer, (0.3, 0.9, 0.9), block=block)
    kept = lookup(query, layer, wide).kept
    read = (kept * layer.levels[-1].sizes[:, None]).sum() / (kept[..., 0].numel() * layer.clustered)
    assert float(read) == pytest.approx(0.3, rel=0.02)  # no more than the coarsest level holds


def test_a_rule_for_a_budget_widens_upwards(layer):
    query = queries(rows=1, batch=16)
    found = rule_for_budget(query, layer, 0.1, 2.0, "none")
    expected = rule_for_shares(query, layer, (0.4, 0.2, 0.1))
    assert found.log_thresholds.equal(expected.log_thresholds) and found.far_alpha is None
