import json
from dataclasses import replace

import pytest
import torch
from captured import CPU, DOCUMENT, KV_HEADS, LAYERS, order, whole, written

import squeezed
from squeezed.errors import SqueezedError
from squeezed.indexing import build
from squeezed.vllm import making
from squeezed.vllm.parts import Parts, joined


def same(one, other):
    names = ("keys", "values", "queries", "scale")
    pairs = [(getattr(one, name), getattr(other, name)) for name in names]
    return all(
        torch.equal(*pair) if torch.is_tensor(pair[0]) else pair[0] == pair[1] for pair in pairs
    )


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_captured_together_what_one_captures(tmp_path, ranks, dtype):
    """On four ranks each KV head is held twice."""
    parts = written(order(tmp_path, ranks, 3), 3, dtype)
    assert parts.is_complete(ranks) and parts.seconds(ranks) == ranks
    found = list(parts.layers(ranks, KV_HEADS, CPU))
    assert len(found) == 3
    assert all(same(one, whole(number, dtype)) for number, one in enumerate(found))


def test_a_file_that_is_not_whole_is_no_part(tmp_path):
    found = order(tmp_path, 2, 2)
    parts = written(found, 2)
    (parts.path / "rank-1.json").unlink()
    assert not parts.is_complete(2)
    parts.end(1, 2, 0.0)
    cut = parts.path / "rank-1.layer-001.safetensors"
    cut.write_bytes(cut.read_bytes()[:-5])
    with pytest.raises(SqueezedError, match=r"rank-1\.layer-001.*index the document again"):
        list(parts.layers(2, KV_HEADS, CPU))


def test_a_rank_that_cannot_is_known_to_all(tmp_path):
    parts = Parts.of(order(tmp_path, 2))
    assert parts.failure(2) is None
    parts.fail(1, "its disk is full")
    assert parts.failure(2) == "its disk is full"
    parts.forget_failure(1)
    assert parts.failure(2) is None


def test_the_order_comes_back(tmp_path):
    found = order(tmp_path)
    parts = Parts.of(found)
    with pytest.raises(SqueezedError, match="no captured document"):
        parts.order  # noqa: B018
    parts.begin(found)
    assert parts.order == found


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_context_is_that_of_one_process(tmp_path, ranks):
    """All layers clustered at once, against some at a time out of files."""
    parts = written(order(tmp_path, ranks))
    said = making.make(parts, CPU)
    assert said["state"] == "saved" and said["tokens"] == DOCUMENT
    context = squeezed.load(tmp_path / "x.sqz")
    config = context.config
    layers, forest = build.cluster(map(whole, range(LAYERS)), DOCUMENT, config.clustering)
    assert len(context.layers) == LAYERS > making.TOGETHER
    for mine, its in zip(context.layers, layers, strict=True):
        assert torch.equal(mine.keys, its.keys) and torch.equal(mine.positions, its.positions)
    for preset in config.presets:
        wanted = making.calibrate(forest, preset, config.budgets, config.calibration)
        for mine, its in zip(
            context.calibration(preset.name).per_token, wanted.per_token, strict=True
        ):
            torch.testing.assert_close(mine, its)
    assert not parts.path.exists()


def test_two_processes_do_not_make_one_context(tmp_path):
    parts = written(order(tmp_path, layers=1), 1)
    with parts.held(), pytest.raises(SqueezedError, match="another process"):
        making.make(parts, CPU)
    assert making.make(parts, CPU)["state"] == "saved"


def test_what_earlier_attempts_left_goes_with_the_last(tmp_path):
    other = written(replace(order(tmp_path, layers=1), tokenizer="another"), 1)
    longer = replace(order(tmp_path, layers=1), path=tmp_path / "x.sqz-more.sqz")
    stays = written(longer, 1)
    parts = written(order(tmp_path, layers=1), 1)
    making.make(parts, CPU)
    assert not other.path.exists() and not parts.path.exists() and stays.path.exists()


def test_the_process_says_what_became_of_it(tmp_path):
    parts = written(order(tmp_path, layers=1), 1)
    (tmp_path / "x.sqz").write_text("something else")
    said = making.run(parts, "cpu", 1)
    assert said["state"] == "failed" and "not a saved context" in said["why"]
    assert "nowhere" in making.run(Parts(tmp_path / "nowhere"), "cpu", 1)["why"]
    (tmp_path / "x.sqz").unlink()
    said = making.run(parts, "cpu", 1)
    assert said["state"] == "saved" and json.dumps(said)


def test_a_process_that_dies_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(making.sys, "executable", "/bin/false")
    assert "status 1" in making.run(Parts(tmp_path), "cpu", 1)["why"]


def test_the_process_has_its_own_threads():
    found = making.environment({"OMP_NUM_THREADS": "64", "PATH": "p"}, 2)
    assert found["OMP_NUM_THREADS"] == found["NUMBA_NUM_THREADS"] == "2" and found["PATH"] == "p"


def test_a_rank_alone_has_all():
    assert joined([whole()], KV_HEADS).keys.shape[0] == KV_HEADS
