"""The tree: a partition in order, with true means, whatever the sizes."""

import pytest
import torch

from squeezed import ClusteringConfig
from squeezed.errors import SqueezedError
from squeezed.indexing.clustering import allot, cluster_layer
from squeezed.indexing.kmeans import spherical_kmeans


def blobs(heads=2, tokens=600, dim=16, centres=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(heads, centres, dim, generator=generator) * 4
    pick = torch.randint(0, centres, (heads, tokens), generator=generator)
    noise = torch.randn(heads, tokens, dim, generator=generator)
    keys = means.gather(1, pick[..., None].expand(-1, -1, dim)) + noise
    return keys, torch.randn(heads, tokens, dim, generator=generator), pick


@pytest.mark.parametrize("levels", [(0.05,), (0.02, 0.1), (0.01, 0.05, 0.2)])
def test_layer_is_a_permutation_of_the_document(levels):
    keys, values, _ = blobs()
    layer = cluster_layer(keys, values, ClusteringConfig(levels=levels))
    order = layer.positions.long()
    assert order.sort(1).values.equal(torch.arange(600).expand(2, -1))
    pick = order[..., None].expand_as(keys)
    assert layer.keys.equal(keys.gather(1, pick)) and layer.values.equal(values.gather(1, pick))
    assert order[:, : layer.pinned].equal(
        torch.cat([torch.arange(16), torch.arange(500, 600)]).expand(2, -1)
    )


@pytest.mark.parametrize("levels", [(0.05,), (0.02, 0.1), (0.01, 0.05, 0.2)])
def test_nodes_partition_their_parents_and_hold_true_means(levels):
    keys, values, _ = blobs()
    layer = cluster_layer(keys, values, ClusteringConfig(levels=levels))
    assert [level.nodes for level in layer.levels] == [round(484 * share) for share in levels]
    for depth, level in enumerate(layer.levels):
        assert (level.key_offsets[:, 0] == layer.pinned).all()
        assert (level.key_offsets[:, -1] == layer.tokens).all()
        for head in range(2):
            for node in range(level.nodes):
                rows = slice(*level.key_offsets[head, node : node + 2].tolist())
                if rows.start == rows.stop:
                    continue
                inside = layer.keys[head, rows]
                torch.testing.assert_close(level.centroids[head, node], inside.mean(0))
                torch.testing.assert_close(
                    level.mean_values[head, node], layer.values[head, rows].mean(0)
                )
                torch.testing.assert_close(
                    level.variance[head, node],
                    inside.var(0, unbiased=False).mean(),
                    atol=1e-4,
                    rtol=1e-3,
                )
        if depth + 1 < len(levels):
            finer = layer.levels[depth + 1]
            assert finer.key_offsets.gather(1, level.child_offsets.long()).equal(level.key_offsets)


def test_clustering_is_deterministic_and_finds_separated_blobs():
    keys, values, pick = blobs(tokens=1200, centres=6)
    config = ClusteringConfig(levels=(0.01,))
    first, second = (cluster_layer(keys, values, config) for _ in range(2))
    assert first.positions.equal(second.positions)
    level = first.levels[0]
    for head in range(2):
        label = pick[head][first.positions[head].long()]
        purity = 0
        for start, end in zip(level.key_offsets[head], level.key_offsets[head, 1:], strict=False):
            purity += label[start:end].bincount(minlength=6).max()
        assert purity > 0.95 * first.clustered


def test_identical_keys_leave_empty_clusters_and_no_nan():
    keys = torch.ones(1, 400, 8)
    layer = cluster_layer(keys, keys, ClusteringConfig(levels=(0.05, 0.2)))
    for level in layer.levels:
        assert level.sizes.sum() == layer.clustered
        assert not level.centroids.isnan().any() and not level.variance.isnan().any()


@pytest.mark.parametrize("tokens", [1, 15, 116, 117, 140])
def test_short_documents_stay_dense(tokens):
    keys = torch.randn(2, tokens, 8)
    layer = cluster_layer(keys, keys, ClusteringConfig())
    assert layer.levels == () and layer.pinned == tokens
    torch.testing.assert_close(layer.keys + layer.centre[:, None], keys)


def test_children_are_shared_by_size():
    sizes = torch.tensor([[100, 0, 10, 1, 289], [1, 1, 1, 1, 396]])
    shares = allot(sizes, 40)
    assert shares.sum(1).tolist() == [40, 40]
    assert (shares <= sizes).all() and ((shares > 0) == (sizes > 0)).all()
    assert shares[0, 4] > shares[0, 0] > shares[0, 2]


def test_kmeans_ignores_padding():
    keys, _, _ = blobs(heads=1, tokens=50)
    points = torch.nn.functional.normalize(keys, dim=-1)
    valid, clusters = torch.ones(1, 50, dtype=torch.bool), torch.tensor([7])
    padded = torch.cat([points, torch.zeros(1, 30, 16)], 1)
    mask = torch.arange(80)[None] < 50
    alone = spherical_kmeans(points, valid, clusters, 4)
    assert spherical_kmeans(padded, mask, clusters, 4)[:, :50].equal(alone)


def test_overhead_is_within_eight_percent():
    keys = torch.randn(1, 6000, 64, dtype=torch.bfloat16)
    layer = cluster_layer(keys, keys, ClusteringConfig())
    assert layer.index_bytes() <= 0.08 * layer.kv_bytes()


@pytest.mark.parametrize(
    "bad", [{"levels": ()}, {"levels": (0.1, 0.05)}, {"levels": (2.0,)}, {"iterations": 0}]
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(SqueezedError, match=next(iter(bad))):
        ClusteringConfig(**bad)


def covariance_over_variance(layer, head):
    """The slope by its definition, in float64, without shrinkage; and what chance would give."""
    leaves, dim = layer.levels[-1], layer.keys.shape[2]
    together, spread = torch.zeros(dim, dim, dtype=torch.float64), 0.0
    energy = torch.zeros(2, dtype=torch.float64)
    for node in range(leaves.nodes):
        rows = slice(*leaves.key_offsets[head, node : node + 2].tolist())
        if rows.stop > rows.start:
            k, v = (x[head, rows].double() for x in (layer.keys, layer.values))
            k, v = k - k.mean(0), v - v.mean(0)
            together += v.T @ k
            energy += torch.stack([k.square().sum(), v.square().sum()])
            spread += float(leaves.variance[head, node]) * (rows.stop - rows.start)
    return together / spread, float(energy.prod() / layer.clustered / together.square().sum())


def test_value_slope_is_the_covariance_inside_leaves_over_their_variance():
    keys, values, _ = blobs(tokens=3000)
    values = 0.1 * values + keys @ torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    layer = cluster_layer(keys, values, ClusteringConfig())
    for head in range(2):
        expected, chance = covariance_over_variance(layer, head)
        assert chance < 0.1
        found = layer.value_slope[head].double()
        torch.testing.assert_close(found, expected * (1 - chance), atol=1e-3, rtol=1e-2)


def test_values_that_do_not_follow_their_keys_have_no_slope():
    keys, values, _ = blobs(tokens=700)
    layer = cluster_layer(keys, values, ClusteringConfig())
    expected, _ = covariance_over_variance(layer, 0)
    assert layer.value_slope[0].norm() < 0.35 * expected.norm()


def test_positions_are_narrow_where_they_fit():
    keys, values, _ = blobs(tokens=300)
    assert cluster_layer(keys, values, ClusteringConfig()).positions.dtype == torch.int16
    keys, values = keys.repeat(1, 120, 1), values.repeat(1, 120, 1)  # 36,000 tokens
    config = ClusteringConfig(levels=(0.001,), iterations=1)
    layer = cluster_layer(keys[:1], values[:1], config)
    assert layer.positions.dtype == torch.int32 and int(layer.positions.max()) == 35_999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("distinct", [1, 2, 7, 300])
@pytest.mark.parametrize("common", [0.0, 3.0])
def test_leaves_of_equal_keys_have_no_slope_and_no_variance(dtype, distinct, common):
    """A layer without positions, few distinct tokens: what is left of sums is rounding."""
    generator = torch.Generator().manual_seed(distinct)
    keys, values = torch.randn(2, 2, distinct, 16, generator=generator)
    queries = torch.randn(4, 48, 16, generator=generator).to(dtype)
    kind = torch.arange(600) % distinct
    keys, values = (keys + common).to(dtype)[:, kind], (values * 50).to(dtype)[:, kind]
    for config in (ClusteringConfig(levels=(0.8, 1.0)), ClusteringConfig()):
        layer = cluster_layer(keys, values, config, queries)
        leaves = layer.levels[-1]
        mixed = torch.zeros(2, dtype=torch.bool)
        for head in range(2):
            for node in range(leaves.nodes):
                rows = slice(*leaves.key_offsets[head, node : node + 2].tolist())
                alike = (layer.keys[head, rows] == layer.keys[head, rows][:1]).all()
                mixed[head] |= not alike
                assert leaves.variance[head, node] == 0 or not alike or common  # centring rounds
        assert (layer.value_slope[~mixed] == 0).all()
        assert layer.value_slope.isfinite().all()
    assert not mixed.any() or distinct == 300


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_slope_is_that_of_the_formula_or_the_largest_that_its_type_holds(dtype, scale):
    """Values are up to 1e6 times the keys; in float16 a slope too large is shrunk as a whole."""
    keys, values, _ = blobs(tokens=3000)
    turn = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    keys = 1e-4 * keys
    values = scale * (keys @ turn * 1e4)
    layer = cluster_layer(keys.to(dtype), values.to(dtype), ClusteringConfig())
    for head in range(2):
        expected, chance = covariance_over_variance(layer, head)
        assert expected.abs().max() > 1e4 * scale and chance < 0.05
        most = min(1.0, torch.finfo(dtype).max / float(expected.abs().max() * (1 - chance)))
        found = layer.value_slope[head].double()
        error = (found - expected * (1 - chance) * most).norm() / (expected * most).norm()
        assert error < 0.02


def test_few_singletons_leave_no_slope():
    for tokens in range(117, 140):
        keys, values = torch.randn(
            2, 2, tokens, 16, generator=torch.Generator().manual_seed(tokens)
        )
        layer = cluster_layer(keys, values, ClusteringConfig(levels=(0.5, 1.0)), values)
        if layer.levels and layer.levels[-1].sizes.max() == 1:
            assert (layer.value_slope == 0).all()
        assert layer.value_slope.abs().max() < 100
