"""A context says with what it was made; one from before it did opens, and says what is assumed."""

import json
from dataclasses import replace

import pytest
from made import made_context, same_context, with_manifest

from squeezed.config import (
    AllotmentConfig,
    CalibrationConfig,
    ClusteringConfig,
    IndexConfig,
    ProbeConfig,
    SpaceConfig,
    TrialConfig,
)
from squeezed.context.growth import Tree, pieces_of, trees_of
from squeezed.context.storage.directory import load
from squeezed.context.storage.manifest import FORMAT_VERSION
from squeezed.context.storage.saving import save
from squeezed.costs.inspection import describe
from squeezed.errors import ContextFileError

CONTEXT = made_context()
UNSAID = ["config.clustering.space", "config.clustering.common_part", "config.calibration"]


def without_rows(manifest):
    del manifest["rows_loss"], manifest["config"]["rows"]
    for outline in manifest["layers"]:
        del outline["encoding"]


def without_growth(manifest):
    without_rows(manifest)
    for name in ("pieces", "trees", "history"):
        del manifest[name]


def older(path):
    """A saved context as version 5 described it."""

    def change(manifest):
        manifest["format_version"] = 5
        without_growth(manifest)
        del manifest["assumed"], manifest["config"]["calibration"]
        del manifest["config"]["clustering"]["space"]
        del manifest["config"]["clustering"]["common_part"]

    with_manifest(path, change)
    return path


@pytest.fixture
def saved(tmp_path):
    return save(CONTEXT, tmp_path / "manual.sqz")


def test_a_saved_context_holds_every_number_that_shaped_it(tmp_path):
    calibration = CalibrationConfig(
        probe=ProbeConfig("Why?", 7),
        alpha_queries=5,
        trials=TrialConfig((0.1, 0.5), 1, (0.0, 0.5), 3),
        allotment=AllotmentConfig(1.0, 0.25, 31),
    )
    clustering = ClusteringConfig(common_part=3.0, space=SpaceConfig(0.5, 0.1, 0.75, 4.0))
    config = IndexConfig(clustering, calibration=calibration)
    path = save(replace(CONTEXT, config=config), tmp_path / "odd.sqz")
    loaded = load(path)
    assert loaded.config == config and loaded.assumed == ()
    shown = json.loads(json.dumps(describe(loaded)))["made_with"]
    assert shown["clustering"]["space"]["plain_share"] == 0.5
    assert shown["calibration"]["allotment"]["least_share"] == 0.25
    assert shown["calibration"]["trials"]["shares"] == [0.1, 0.5]
    assert shown["calibration"]["probe"]["question"] == "Why?"


def test_a_context_from_before_opens_and_says_what_is_assumed(saved):
    loaded = load(older(saved))
    assert same_context(loaded, CONTEXT) and list(loaded.assumed) == UNSAID
    assert describe(loaded)["assumed"] == UNSAID
    space, calibration = loaded.config.clustering.space, loaded.config.calibration
    assert (space.plain_share, space.value_weight) == (0.35, 0.3)
    assert (space.value_dimensions, space.farthest) == (0.25, 10.0)
    assert loaded.config.clustering.common_part == 2.0
    assert calibration.alpha_queries == calibration.trials.queries == 24
    assert calibration.trials.shares == (0.005, 0.015, 0.04, 0.1, 0.2, 0.4, 0.7, 0.92)
    assert calibration.trials.far_fitted_at == 2
    assert calibration.trials.far_parts == (0.0, 0.25, 0.5, 0.75, 1.0)
    allotment, scores = calibration.allotment, calibration.scores
    assert (allotment.first_layer_weight, allotment.least_share, allotment.steps) == (3, 0.65, 97)
    assert (scores.lowest, scores.highest, scores.bins) == (-60, 4, 6400)
    assert calibration.probe.excerpt_characters == 120
    assert calibration.probe.question.startswith("What is this about, and what are its main points")


def test_what_was_assumed_is_still_marked_when_saved_again(saved, tmp_path):
    again = save(load(older(saved)), tmp_path / "again.sqz")
    assert json.loads((again / "context.json").read_text())["format_version"] == FORMAT_VERSION
    assert list(load(again).assumed) == UNSAID


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(assumed=[]),
        lambda manifest: manifest["config"].update(calibration={}),
        lambda manifest: manifest["config"]["clustering"].update(space=None),
        lambda manifest: manifest.update(config=[]),
        lambda manifest: manifest["config"].update(clustering=3),
        lambda manifest: manifest.pop("config"),
    ],
)
def test_a_description_of_two_versions_is_refused(change, saved):
    with_manifest(older(saved), change)
    with pytest.raises(ContextFileError, match="no context looks like that"):
        load(saved)


def test_a_context_of_version_6_opens_as_one_that_never_grew(saved):
    def change(manifest):
        manifest["format_version"] = 6
        without_growth(manifest)

    with_manifest(saved, change)
    loaded = load(saved)
    assert same_context(loaded, CONTEXT)
    assert loaded.pieces == loaded.trees == loaded.history == ()
    assert pieces_of(loaded) == (90,) and trees_of(loaded) == (Tree(80, (3, 9)),)


def test_a_context_of_version_7_opens_as_one_with_plain_rows(saved):
    def change(manifest):
        manifest["format_version"] = 7
        without_rows(manifest)

    with_manifest(saved, change)
    loaded = load(saved)
    assert same_context(loaded, CONTEXT) and loaded.rows == loaded.config.rows == "plain"
    assert loaded.rows_loss == ()


@pytest.mark.parametrize("name", ["rows_loss", "encoding"])
def test_a_description_of_version_7_that_knows_of_rows_is_refused(name, saved):
    def change(manifest):
        manifest["format_version"] = 7
        del manifest["config"]["rows"]
        kept = manifest.pop("rows_loss")
        if name == "rows_loss":
            manifest["rows_loss"] = kept

    with_manifest(saved, change)
    with pytest.raises(ContextFileError, match=name):
        load(saved)


GROWTH = {
    "pieces": [[40, 51], [0, 90], "x"],
    "trees": [
        [{"tokens": 79, "nodes": [3, 9]}],
        [{"tokens": 80, "nodes": [3, 8]}],
        [{"tokens": 80, "nodes": [9]}],
        [{"tokens": 40, "nodes": [3, 9]}, {"tokens": 40, "nodes": []}],
        [{"tokens": 81, "nodes": [3, 9]}, {"tokens": -1, "nodes": [1, 1]}],
        [{"tokens": 80}],
    ],
    "history": [[{"kind": "index"}], [3]],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n in GROWTH for v in GROWTH[n]])
def test_growth_that_no_context_has_is_refused(name, value, saved):
    with_manifest(saved, lambda manifest: manifest.update({name: value}))
    with pytest.raises(ContextFileError, match="no context looks like that"):
        load(saved)


@pytest.mark.parametrize("name", ["space", "common_part"])
def test_a_description_of_this_version_says_everything(name, saved):
    with_manifest(saved, lambda manifest: manifest["config"]["clustering"].pop(name))
    with pytest.raises(ContextFileError, match=name):
        load(saved)
