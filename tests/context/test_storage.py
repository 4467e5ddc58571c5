"""A saved context comes back identical, or fails with one clear line."""

import copy
import json

import pytest
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.context.prompt import PromptTemplate
from squeezed.context.storage import directory, tensorfile
from squeezed.errors import ContextFileError


@pytest.fixture(scope="module")
def model():
    return tiny_model("gemma3")


@pytest.fixture(scope="module")
def context(model):
    config = squeezed.IndexConfig(
        clustering=squeezed.ClusteringConfig(levels=(0.05, 0.2), pinned_last=20)
    )
    return squeezed.index(model, tiny_tokenizer(), document(), config, PromptTemplate.plain())


@pytest.fixture
def saved(context, tmp_path):
    return context.save(tmp_path / "manual.sqz")


def test_saving_again_gives_identical_bytes(context, saved, model, tmp_path):
    again = squeezed.load(saved, model).save(tmp_path / "again.sqz")
    names = sorted(file.name for file in saved.iterdir())
    assert names == sorted(file.name for file in again.iterdir())
    for name in names:
        assert (saved / name).read_bytes() == (again / name).read_bytes()


def test_loaded_context_answers_alike(context, saved, model):
    loaded = squeezed.load(saved, model)
    arguments = {"budget": 0.2, "implementation": "reference", "max_new_tokens": 6}
    answers = [
        squeezed.generate(model, tiny_tokenizer(), c, "what is mu?", **arguments)
        for c in (context, loaded)
    ]
    assert answers[0].tokens.equal(answers[1].tokens)
    assert answers[0].spending == answers[1].spending


def test_layers_are_opened_when_first_used(saved):
    layers = directory.load(saved).layers
    assert not layers.opened
    assert layers[1].tokens == layers[-2].tokens and len(layers.opened) == 1


def test_every_layer_has_its_softmax_scale_again_past_sliding_windows(context, saved):
    config = tiny_model("gemma3").config
    scales = [layer.scale for layer in squeezed.load(saved).clustered_layers]
    assert scales == [layer.scale for layer in context.clustered_layers]
    assert len(scales) < config.num_hidden_layers
    assert set(scales) == {config.query_pre_attn_scalar**-0.5}


def test_another_model_is_refused(saved):
    with pytest.raises(ContextFileError, match="another model"):
        squeezed.load(saved, tiny_model("gemma3", seed=1))


def test_another_tokenizer_is_refused(context, model):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ContextFileError, match="tokenizer"):
        squeezed.generate(model, tokenizer, context, "x")


@pytest.mark.parametrize("name", ["layer_001.safetensors", "context.json"])
def test_truncated_file_is_refused(saved, name):
    file = saved / name
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ContextFileError, match="damaged"):
        squeezed.load(saved)


def test_altered_layer_is_refused(saved):
    file = saved / "layer_001.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ContextFileError, match="checksum"):
        squeezed.load(saved).layers[1]


def test_altered_manifest_is_refused(saved):
    file = saved / "context.json"
    manifest = json.loads(file.read_text())
    manifest["scales"][0] *= 2
    file.write_text(json.dumps(manifest))
    with pytest.raises(ContextFileError, match="altered"):
        squeezed.load(saved)


def test_older_format_is_refused(saved):
    file = saved / "context.json"
    manifest = json.loads(file.read_text())
    manifest["format_version"] = 0
    file.write_text(json.dumps(manifest))
    with pytest.raises(ContextFileError, match="format version 0"):
        squeezed.load(saved)


def test_missing_context_is_refused(tmp_path):
    with pytest.raises(ContextFileError, match="no saved context"):
        squeezed.load(tmp_path / "nothing.sqz")


def test_foreign_directory_is_not_overwritten(context, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep me")
    with pytest.raises(ContextFileError, match="not a saved context"):
        context.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "keep me"


def test_full_disk_leaves_the_old_context_intact(context, saved, monkeypatch):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    calls = []

    def full(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real(*arguments, **keywords)

    real = tensorfile.write
    monkeypatch.setattr(tensorfile, "write", full)
    with pytest.raises(ContextFileError, match="No space left"):
        context.save(saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    assert [entry.name for entry in saved.parent.iterdir()] == [saved.name]


def test_interrupted_saving_leaves_nothing_under_the_final_name(context, tmp_path, monkeypatch):
    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(tensorfile, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        context.save(tmp_path / "half.sqz")
    assert list(tmp_path.iterdir()) == []
