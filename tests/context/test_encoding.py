"""Encoded rows: how far they are from the rows, and that they mean what their formula says."""

import math
from dataclasses import replace

import pytest
import torch
from trees import random_layer

from squeezed.config import ClusteringConfig
from squeezed.context import encoding, turning
from squeezed.context.encoding import ENCODINGS, encoded, wide
from squeezed.context.rows import Rows
from squeezed.errors import SqueezedError
from squeezed.indexing.clustering import cluster_layer
from squeezed.testing.keys import REAL_LIKE, draw

DIMS = [64, 80, 96, 128, 256]

ROOM = {"int4": 0.125, "int8": 0.012}
"""Relative errors of normal numbers with the best uniform levels are .107 (16) and about .008 (255,
without cuts); a row's own best scale is nearer to it than a tenth above."""


def clustered(kind, dim, dtype=torch.bfloat16, tokens=600, heads=2):
    drawn = draw(REAL_LIKE[kind], tokens, heads, dim, dtype)
    config = ClusteringConfig(pinned_first=4, pinned_last=12)
    return cluster_layer(drawn.keys, drawn.values, config, drawn.probe, drawn.scale)


def residuals(layer):
    """Differences of keys and values from their leaves' means, float64 `[Hkv, n, D]`."""
    means = layer.levels[-1].centroids, layer.levels[-1].mean_values
    return [
        rows[:, layer.pinned :].double() - torch.stack(list(layer.of_leaves(mean))).double()
        for rows, mean in zip((layer.keys, layer.values), means, strict=True)
    ]


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kind", ["plain", "common 1000", "few directions", "heavy tails"])
def test_rows_come_back_to_within_the_levels(name, dim, kind):
    layer = clustered(kind, dim)
    written = encoded(layer, name)
    for found, exact, away in zip(
        wide(written, torch.float64), (layer.keys, layer.values), residuals(layer), strict=True
    ):
        assert found[:, : layer.pinned].equal(exact[:, : layer.pinned].double())
        error = (found - exact.double())[:, layer.pinned :].norm(dim=-1)
        length = away.norm(dim=-1)
        assert bool((error <= 2 * ROOM[name] * length + 1e-12).all())
        assert error.square().mean().sqrt() <= ROOM[name] * length.square().mean().sqrt()


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_difference_in_one_dimension_alone_is_spread_over_all(name):
    rows, matrix = torch.eye(128)[:5] * 1000, turning.rotation(128).float()
    codes, scales = encoding.quantised(rows @ matrix.mT, ENCODINGS[name])
    back = scales.float()[:, None] * (codes - ENCODINGS[name].zero) @ matrix
    assert (back - rows).norm(dim=-1).max() < 1000 * 2**-8  # the scale's rounding alone


@pytest.mark.parametrize("dim", [*DIMS, 6, 7, 1])
def test_the_rotation_keeps_lengths_and_spreads_every_dimension(dim):
    matrix = turning.rotation(dim)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(dim, dtype=torch.float64))
    assert bool((matrix.abs() <= math.sqrt(2 / dim) + 1e-12).all())
    if dim & (dim - 1) == 0:
        parts = [[(-1.0) ** (i & j).bit_count() for j in range(dim)] for i in range(dim)]
        expected = torch.tensor(parts, dtype=torch.float64) * turning.random_signs(dim)
        torch.testing.assert_close(matrix, expected / math.sqrt(dim))


def test_signs_are_the_same_always_and_of_both_kinds():
    signs = turning.random_signs(128)
    assert "".join("+" if s > 0 else "-" for s in signs[:16].tolist()) == "+-+---+--+-+++-+"
    assert 48 <= int((signs > 0).sum()) <= 80
    assert turning.random_signs(64).equal(signs[:64])


def logit_error(layer, found, queries):
    """Mean square error of the logits of clustered keys."""
    away = (found - layer.keys.double())[:, layer.pinned :]
    query = queries.double().unflatten(0, (layer.kv_heads, -1)).flatten(1, 2)
    return float((query @ away.mT).square().mean())


@pytest.mark.parametrize("kind", ["few directions", "heavy tails"])
@pytest.mark.parametrize("dim", [64, 80])
def test_keys_err_less_where_queries_look(kind, dim):
    drawn = draw(REAL_LIKE[kind], 800, 2, dim, torch.bfloat16, group=2, probe=200, rows=100)
    strength = torch.linspace(0.1, 3, dim) ** 2
    probe, asked = (drawn.probe * strength).bfloat16(), drawn.query[0] * strength
    layer = cluster_layer(drawn.keys, drawn.values, ClusteringConfig(pinned_last=4), probe)
    plain, fitted = (wide(encoded(layer, "int4", seen), torch.float64) for seen in (None, probe))
    assert logit_error(layer, fitted[0], asked) < 0.8 * logit_error(layer, plain[0], asked)
    assert fitted[1].equal(plain[1])


@pytest.mark.parametrize("nothing", ["queries", "differences"])
def test_a_probe_or_a_layer_without_any_direction_is_turned_all_the_same(nothing):
    layer = random_layer()
    probe = torch.randn(4, 9, 32)
    if nothing == "queries":
        probe = torch.zeros_like(probe)
    else:
        layer = random_layer(keys=torch.ones(2, 300, 32))
    found = wide(encoded(layer, "int4", probe), torch.float64)[0]
    away = (found - layer.keys.double()).norm() / layer.keys.double().norm()
    assert away < 0.1 if nothing == "queries" else away == 0


def test_bytes_are_those_of_codes_and_scales():
    layer = random_layer(dtype=torch.bfloat16)
    for name, bits in (("int4", 4), ("int8", 8)):
        rows = encoded(layer, name).rows
        assert rows.bytes_per_row == 2 * (32 * bits // 8 + 2)
        assert rows.kv_bytes() == 2 * (280 * rows.bytes_per_row + 20 * 2 * 32 * 2)
        turns = encoded(layer, name).index_bytes() - layer.index_bytes()
        assert turns == 2 * 2 * 32 * 32 * 2  # of keys and of values
        assert rows.tokens == 300


def test_codes_are_packed_with_the_second_half_of_the_dimensions_above():
    layer = random_layer(dim=8, dtype=torch.float32)
    codes = encoded(layer, "int4").rows.codes
    numbers = encoding.levels(codes.keys, "int4", torch.float64)
    assert codes.keys.dtype == torch.uint8 and codes.keys.shape == (2, 280, 4)
    assert numbers[..., :4].equal((codes.keys % 16).double() - 7.5)
    assert numbers[..., 4:].equal((codes.keys // 16).double() - 7.5)


def test_logits_and_outputs_need_no_row_turned_back():
    layer = random_layer()
    written = encoded(layer, "int4")
    codes, leaves = written.rows.codes, written.levels[-1]
    query, weights = torch.randn(2, 1, 32).double(), torch.rand(2, 1, 280).double()
    keys, values = (x[:, layer.pinned :] for x in wide(written, torch.float64))
    level = [encoding.levels(x, "int4", torch.float64) for x in (codes.keys, codes.values)]
    means = [
        torch.stack(list(written.of_leaves(x))).double()
        for x in (leaves.centroids, leaves.mean_values)
    ]
    scale = [x.double()[:, None] for x in (codes.key_scales, codes.value_scales)]
    logits = query @ means[0].mT + scale[0] * (query @ codes.key_turn.double() @ level[0].mT)
    torch.testing.assert_close(logits, query @ keys.mT)
    output = weights @ means[1] + (weights * scale[1]) @ level[1] @ codes.value_turn.double()
    torch.testing.assert_close(output, weights @ values)


def test_rows_that_are_their_leaf_mean_come_back_exactly():
    keys = torch.ones(1, 60, 16).bfloat16() * 3
    layer = random_layer(keys=keys, nodes=(2, 5), dtype=torch.bfloat16)
    layer = replace(layer, rows=Rows(keys, keys * 0.5))
    level = replace(layer.levels[-1], mean_values=layer.levels[-1].centroids * 0.5)
    layer = replace(layer, levels=(*layer.levels[:-1], level))
    for name in ENCODINGS:
        found = wide(encoded(layer, name), torch.float32)
        assert found[0].equal(keys.float()) and found[1].equal(keys.float() * 0.5)


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e6, 1e30])
def test_rows_of_any_magnitude_keep_their_relative_error(factor):
    layer = random_layer(dtype=torch.float32, keys=torch.randn(2, 300, 32) * factor)
    found = wide(encoded(layer, "int4"), torch.float64)[0]
    error, exact = (found - layer.keys.double())[:, 20:], residuals(layer)[0]
    assert error.norm() < 0.125 * exact.norm()


def test_what_cannot_be_encoded_is_refused_in_a_line():
    layer = random_layer()
    with pytest.raises(SqueezedError, match="expected one of plain, int8, int4, got 'int3'"):
        encoded(layer, "int3")
    with pytest.raises(SqueezedError, match="even head dimension, got 7; use 'int8'"):
        encoded(random_layer(dim=7), "int4")
    assert encoded(random_layer(dim=7), "int8").rows.codes.keys.shape == (2, 280, 7)
    with pytest.raises(SqueezedError, match=r"expected plain .* got the encoding 'int4'"):
        encoded(encoded(layer, "int4"), "int8")
    large = random_layer(dtype=torch.float32, keys=torch.randn(2, 300, 32) * 3e37)
    with pytest.raises(SqueezedError, match="'int4' cannot hold keys or values this large"):
        encoded(large, "int4")


def test_a_layer_without_clusters_stays_plain():
    layer = replace(random_layer(), levels=(), pinned=300)
    assert encoded(layer, "int4") is layer
