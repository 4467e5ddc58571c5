"""The space of the queries: distances there are differences of logits."""

import torch

from squeezed.config import ClusteringConfig, SpaceConfig
from squeezed.indexing.clustering import cluster_layer
from squeezed.indexing.space import (
    compared_dimensions,
    place_points,
    space_factor,
    weighted_values,
)

SPACE = SpaceConfig(plain_share=0.2, value_weight=0.5, value_dimensions=0.3)


def query_space(keys, queries, plain_share=SPACE.plain_share):
    return keys.float() @ space_factor(queries, len(keys), plain_share)


def test_squared_distance_is_the_mean_square_of_what_queries_see():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 2, 16, generator=generator)
    queries = torch.randn(6, 40, 16, generator=generator)
    queries *= torch.tensor([1.0, 9.0, 0.1, 3.0, 0.5, 20.0]).view(6, 1, 1)
    mapped = query_space(keys, queries)
    for head in range(2):
        away = keys[head, 0] - keys[head, 1]
        direction = torch.nn.functional.normalize(queries[3 * head : 3 * head + 3], dim=-1)
        seen = 16 * (direction @ away).square().mean()
        expected = 0.8 * seen + 0.2 * away.square().sum()
        found = (mapped[head, 0] - mapped[head, 1]).square().sum()
        torch.testing.assert_close(found, expected)


def test_one_query_is_enough_and_bfloat16_is_taken():
    keys = torch.randn(2, 9, 16, dtype=torch.bfloat16)
    mapped = query_space(keys, torch.randn(2, 1, 16, dtype=torch.bfloat16))
    assert mapped.dtype == torch.float32 and mapped.isfinite().all()


def narrow_queries():
    """Keys that vary alike in all directions, and queries that see the first two alone."""
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 2, 1500, 16, generator=generator)
    queries = torch.zeros(4, 50, 16)
    queries[..., :2] = torch.randn(4, 50, 2, generator=generator)
    return keys, values, queries


def logit_spread(layer, queries):
    """Mean variance of the logits within a leaf."""
    level = layer.levels[-1]
    logits = layer.keys @ queries.unflatten(0, (2, -1)).flatten(1, 2).mT
    total = 0.0
    for head in range(2):
        for start, end in level.key_offsets[head].unfold(0, 2, 1).tolist():
            if end > start:
                total += float(logits[head, start:end].var(0, unbiased=False).mean()) * (
                    end - start
                )
    return total / (2 * layer.clustered)


def test_clusters_in_the_queries_space_hold_keys_with_closer_logits():
    keys, values, queries = narrow_queries()
    config = ClusteringConfig()
    plain = cluster_layer(keys, values, config)
    seen = cluster_layer(keys, values, config, queries)
    assert logit_spread(seen, queries) < 0.6 * logit_spread(plain, queries)


def test_nodes_keep_raw_means_and_get_the_variance_that_queries_see():
    keys, values, queries = narrow_queries()
    layer = cluster_layer(keys, values, ClusteringConfig(space=SPACE), queries)
    mapped = query_space(layer.keys, queries)
    for level in layer.levels:
        for node in range(level.nodes):
            rows = slice(*level.key_offsets[1, node : node + 2].tolist())
            if rows.stop > rows.start:
                torch.testing.assert_close(level.centroids[1, node], layer.keys[1, rows].mean(0))
                torch.testing.assert_close(
                    level.variance[1, node],
                    mapped[1, rows].var(0, unbiased=False).mean(),
                    atol=1e-4,
                    rtol=1e-3,
                )


def test_values_beside_keys_have_their_weight_whatever_their_scale():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 200, 8, generator=generator)
    spread = torch.tensor([3.0, 0.2])
    for scale in (1.0, 1e3):
        beside = weighted_values(scale * values + 7.0, spread, SPACE)
        of_values = beside.var(1, correction=0).sum(-1)
        torch.testing.assert_close((of_values / spread).sqrt(), torch.full((2,), 0.5))
    assert weighted_values(0 * values, spread, SPACE).isfinite().all()


def test_points_are_directions_of_keys_in_the_space_and_values_beside_them():
    generator = torch.Generator().manual_seed(2)
    keys, values = torch.randn(2, 2, 90, 8, generator=generator) + 3
    queries = torch.randn(6, 20, 8, generator=generator)
    points = torch.full((2, 90, compared_dimensions(8, SPACE)), float("nan"))
    centre = torch.randn(2, 8, generator=generator)
    space = place_points(keys, values, queries, centre, points, SPACE)
    compared = query_space(keys, queries)
    spread = compared.var(1, correction=0).sum(-1)
    joined = torch.cat([compared, weighted_values(values, spread, SPACE)], -1)
    torch.testing.assert_close(points, torch.nn.functional.normalize(joined, dim=-1))
    away = compared - compared.mean(1, keepdim=True)
    torch.testing.assert_close(space.energy, away.square().mean(-1), atol=1e-5, rtol=1e-4)
    stored = keys - centre[:, None]
    torch.testing.assert_close(stored @ space.factor - space.middle, away, atol=1e-5, rtol=1e-4)


def test_a_far_common_part_leaves_directions_that_tell_keys_apart():
    generator = torch.Generator().manual_seed(3)
    keys, values = torch.randn(2, 1, 200, 16, generator=generator)
    queries = torch.randn(2, 40, 16, generator=generator)

    def neighbours(offset):
        shifted, dim = keys.double() + offset, compared_dimensions(16, SPACE)
        points = torch.empty(1, 200, dim, dtype=torch.float64)
        centre = shifted.float().mean(1)
        place_points(shifted.float(), values, queries, centre, points, SPACE)
        points = points.to(torch.float16).float()[0]  # what a GPU compares
        return (points @ points.T).fill_diagonal_(-1).topk(5).indices

    common = torch.randn(16, generator=generator).double()
    near, far = (neighbours(ratio * common) for ratio in (30, 1000))
    shared = (near[:, :, None] == far[:, None]).any(-1).float().mean()
    assert shared > 0.9, "neighbours must not depend on how far off all keys are"
