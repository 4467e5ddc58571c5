"""No number of the settings is ignored: each of them changes what is made."""

from dataclasses import replace

import pytest
import torch

from squeezed.config import (
    BEST,
    AllotmentConfig,
    CalibrationConfig,
    ClusteringConfig,
    HistogramConfig,
    ProbeConfig,
    SpaceConfig,
    TrialConfig,
)
from squeezed.context.captured import ObservedLayer
from squeezed.errors import SqueezedError
from squeezed.indexing.calibrate import calibrate
from squeezed.indexing.clustering import cluster_layer
from squeezed.indexing.forest import Forest
from squeezed.indexing.probe import probe_question
from squeezed.testing.parts import Parts

BUDGETS = (0.05, 0.2)


def drawn():
    parts = Parts.of(2, 16, "cpu", 3)
    keys = parts.keys(500, torch.float32)
    values = torch.randn(keys.shape, generator=parts.generator)
    return keys, values, parts.queries(60, 2, keys.dtype)[0]


def tree(config):
    keys, values, queries = drawn()
    return cluster_layer(keys, values, config, queries)


def fitted(config):
    keys, values, queries = drawn()
    layer = cluster_layer(keys, values, ClusteringConfig(), queries, 0.25)
    seen = [ObservedLayer(layer, scale * queries) for scale in (1.0, 3.0)]
    found = calibrate(Forest.of(seen), BEST, BUDGETS, config)
    return [*found.per_token, *found.per_block, *found.alpha, *found.far_alpha]


def same(one, other):
    return all(a.shape == b.shape and a.equal(b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    "changed",
    [
        SpaceConfig(plain_share=0.9),
        SpaceConfig(value_weight=2.0),
        SpaceConfig(value_dimensions=0.75),
        SpaceConfig(farthest=0.1),
    ],
    ids=str,
)
def test_every_setting_of_the_space_changes_the_tree(changed):
    expected = tree(ClusteringConfig()).tensors()
    assert not same(tree(ClusteringConfig(space=changed)).tensors(), expected)


def test_less_of_the_keys_is_common_if_more_deviations_are_asked():
    centres = [tree(ClusteringConfig(common_part=d)).centre for d in (0.0, 2.0, 1e5)]
    counts = [int((centre != 0).sum()) for centre in centres]
    assert counts[0] > counts[1] > counts[2] == 0


@pytest.mark.parametrize(
    "changed",
    [
        {"alpha_queries": 3},
        {"trials": TrialConfig(queries=3)},
        {"trials": TrialConfig(shares=(0.01, 0.02, 0.9))},
        {"trials": TrialConfig(far_fitted_at=7)},
        {"trials": TrialConfig(far_parts=(0.6,))},
        {"allotment": AllotmentConfig(first_layer_weight=1e4)},
        {"allotment": AllotmentConfig(least_share=1.0)},
        {"allotment": AllotmentConfig(steps=5)},
        {"scores": HistogramConfig(lowest=-3.0)},
        {"scores": HistogramConfig(highest=-4.0)},
        {"scores": HistogramConfig(bins=50)},
    ],
    ids=str,
)
def test_every_setting_of_calibration_changes_what_is_fitted(changed):
    assert same(fitted(CalibrationConfig()), fitted(CalibrationConfig()))
    assert not same(fitted(replace(CalibrationConfig(), **changed)), fitted(CalibrationConfig()))


def test_a_probe_is_its_question_and_two_excerpts():
    text = "abcdefghi" * 3
    assert probe_question(text, ProbeConfig("Why?", 4)) == "Why? abcd abcd"
    assert probe_question(text, ProbeConfig("Why?", 0)).strip() == "Why?"


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: SpaceConfig(plain_share=0.0), "plain_share: "),
        (lambda: SpaceConfig(value_weight=float("nan")), "value_weight: "),
        (lambda: SpaceConfig(farthest="far"), "farthest: "),
        (lambda: ClusteringConfig(space=0.35), "space: "),
        (lambda: TrialConfig(shares=(0.5, 0.1)), "shares: "),
        (lambda: TrialConfig(far_fitted_at=8), "far_fitted_at: "),
        (lambda: TrialConfig(far_parts=()), "far_parts: "),
        (lambda: AllotmentConfig(least_share=1.5), "least_share: "),
        (lambda: HistogramConfig(lowest=5.0), "highest: "),
        (lambda: CalibrationConfig(probe="Why?"), "probe: "),
        (lambda: ProbeConfig(question=3), "question: "),
    ],
)
def test_senseless_settings_are_refused_by_name(make, named):
    with pytest.raises(SqueezedError, match=f"^{named}"):
        make()
