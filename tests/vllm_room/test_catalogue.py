import shutil
import threading

import pytest
from saved import BLOCK, checkpoint, made, put
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.errors import SqueezedError
from squeezed.hf.identity.checkpoint import Checkpoint
from squeezed.vllm.catalogue import Catalogue


def catalogue(*places, block=BLOCK, check=lambda record: None):
    found = Catalogue(places, block, lambda record: record.kv_bytes(), check)
    found.look()
    return found


def test_contexts_are_found_at_start_and_later(tmp_path):
    put(tmp_path, "one")
    found = catalogue(tmp_path)
    assert set(found.contexts) == {"one"}
    put(tmp_path, "two", words=500, seed=1)
    found.look()
    assert set(found.contexts) == {"one", "two"}
    shutil.rmtree(tmp_path / "one.sqz")
    found.look()
    assert set(found.contexts) == {"two"}


def test_a_context_itself_is_a_place():
    path, ids = made()
    entry = catalogue(path).contexts[path.stem]
    assert entry.tokens == ids[: len(entry.tokens)]
    assert entry.dropped == len(ids) - len(entry.tokens)
    assert entry.presets == ("paper", "best")
    assert entry.bytes > 0


def test_the_longest_context_that_begins_a_prompt_is_used(tmp_path):
    short, long = document(500, 3), document(500, 3) + " and more words of the same document" * 9
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    for name, text in (("short", short), ("long", long), ("other", document(600, 4))):
        squeezed.index(model, tokenizer, text).save(tmp_path / f"{name}.sqz")
    found = catalogue(tmp_path)
    ids = {name: entry.tokens for name, entry in found.contexts.items()}
    assert len(ids["short"]) < len(ids["long"])
    assert found.match([*ids["long"], 7]).name == "long"
    assert found.match(ids["long"]).name == "short"  # says nothing after the longer one
    assert found.match(ids["long"][:-1]).name == "short"
    assert found.match([*ids["short"][:-1], 255, 7]) is None
    assert found.match(ids["short"]) is None
    assert found.match([]) is None


def test_half_a_context_is_refused_and_found_when_it_is_whole(tmp_path):
    put(tmp_path, "whole")
    put(tmp_path, "half", words=500)
    (tmp_path / "empty.sqz").mkdir()
    file = tmp_path / "half.sqz" / "layer_001.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-9])
    found = catalogue(tmp_path)
    assert set(found.contexts) == {"whole"}
    assert set(found.refused) == {"half", "empty"}
    with pytest.raises(SqueezedError, match=r"half cannot be used .*layer_001"):
        found.named("half")
    shutil.rmtree(tmp_path / "half.sqz")
    put(tmp_path, "half", words=500)
    found.look()
    assert set(found.contexts) == {"whole", "half"}


def test_a_replaced_context_has_another_version(tmp_path):
    put(tmp_path, "one")
    found = catalogue(tmp_path)
    before = found.contexts["one"]
    shutil.rmtree(tmp_path / "one.sqz")
    put(tmp_path, "one", words=500)
    found.look()
    after = found.contexts["one"]
    assert before.key != after.key
    assert len(before.tokens) > len(after.tokens)


def test_a_name_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    put(tmp_path, "one")
    with pytest.raises(SqueezedError, match=r"\(one\) or 'none', got 'two'"):
        catalogue(tmp_path).named("two")


def test_a_context_that_was_just_made_is_found_by_its_name(tmp_path):
    put(tmp_path, "one")
    found = catalogue(tmp_path)
    put(tmp_path, "two", words=500, seed=1)
    assert found.named("two").name == "two"
    assert set(found.contexts) == {"one", "two"}
    (tmp_path / "bad.sqz").mkdir()
    with pytest.raises(SqueezedError, match="cannot be used"):
        found.named("bad")
    with pytest.raises(SqueezedError, match="one, two"):
        found.named("../two")


def test_a_place_that_is_not_there_is_no_end(tmp_path):
    assert catalogue(tmp_path / "nowhere").contexts == {}


def test_blocks_that_the_pinned_tail_does_not_fill_are_refused(tmp_path):
    put(tmp_path, "one")
    found = catalogue(tmp_path, block=256)
    assert not found.contexts
    assert "--block-size" in found.refused["one"]


def test_contexts_of_another_model_are_refused(tmp_path):
    put(tmp_path, "own")
    put(tmp_path, "strange", model_seed=1)
    config = tiny_model("llama").config
    found = catalogue(tmp_path, check=Checkpoint(checkpoint(), config).check)
    assert set(found.contexts) == {"own"}
    assert "another model" in found.refused["strange"]


def test_a_context_that_breaks_the_check_is_no_end(tmp_path):
    def check(record):
        raise KeyError("what nobody foresaw")

    put(tmp_path, "one")
    assert "foresaw" in catalogue(tmp_path, check=check).refused["one"]


def test_watching_finds_what_comes(tmp_path):
    found = catalogue(tmp_path)
    found.watch(0.02)
    put(tmp_path, "one")
    there = threading.Event()
    for _ in range(500):
        if found.contexts or there.wait(0.02):
            break
    found.end()
    assert set(found.contexts) == {"one"}
