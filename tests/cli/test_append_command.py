"""`squeezed append`: the new context or the old one lies there, whatever happens."""

import json
import os
import random
import signal
import time

import pytest
from made import same_context
from test_cli import refused, run
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.context.storage.manifest import listed_files
from squeezed.system.files import unnamed

TEXT, MORE = document(400), document(160, seed=1)
KILLS = 6


@pytest.fixture
def place(tmp_path):
    """A directory with a model, a saved context and more text."""
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    context().save(tmp_path / "manual.sqz")
    (tmp_path / "chapter.txt").write_text(MORE, encoding="utf-8")
    return tmp_path


def context():
    return squeezed.index(tiny_model(), tiny_tokenizer(), TEXT)


def command(place, *words):
    return ("append", place / "manual.sqz", place / "chapter.txt", "-m", place / "model", *words)


def test_append_replaces_the_context_and_says_what_it_cost(capsys, place):
    status, out, _ = run(capsys, *command(place, "--json"))
    record = json.loads(out)
    assert status == 0 and record["change"] == "append"
    assert (record["kept"], record["tokens"]) == (401, 561) and record["pieces"] == [401, 160]
    assert record["read"] > 160 and record["calibrated"] and record["seconds"] > 0
    grown = squeezed.load(place / "manual.sqz", tiny_model())
    assert tiny_tokenizer().decode(grown.tokens) == "<s>" + TEXT + MORE
    status, out, _ = run(capsys, *command(place))
    assert status == 0 and "721 tokens, 561 of them kept" in out


def test_append_with_an_output_leaves_the_old_context(capsys, place):
    status, _, _ = run(capsys, *command(place, "-o", place / "two.sqz"))
    assert status == 0 and len(squeezed.load(place / "two.sqz").tokens) == 561
    assert same_context(squeezed.load(place / "manual.sqz"), context())


def test_append_refuses_in_one_line_before_the_model_is_loaded(capsys, place):
    (place / "empty.txt").write_text(" ", encoding="utf-8")
    text = place / "chapter.txt"
    line = refused(capsys, "append", place / "manual.sqz", place / "empty.txt", "-m", "nobody/none")
    assert "empty" in line
    assert "no saved context" in refused(capsys, "append", text, text, "-m", "nobody/none")
    line = refused(capsys, *command(place, "-o", place / "model"))
    assert "not a saved context" in line
    assert "budget" in refused(capsys, *command(place, "-b", "0"))


def test_update_reads_from_the_first_change_on(capsys, place):
    (place / "new.txt").write_text(TEXT[:300] + "OMEGA" + TEXT[300:], encoding="utf-8")
    words = ("update", place / "manual.sqz", place / "new.txt", "-m", place / "model", "--json")
    status, out, _ = run(capsys, *words)
    record = json.loads(out)
    assert status == 0 and (record["change"], record["kept"], record["dropped"]) == (
        "replace", 301, 100,
    )  # fmt: skip
    changed = squeezed.load(place / "manual.sqz", tiny_model())
    assert tiny_tokenizer().decode(changed.tokens) == "<s>" + TEXT[:300] + "OMEGA" + TEXT[300:]
    status, out, _ = run(capsys, *words)
    assert status == 0 and json.loads(out)["seconds"] == record["seconds"]  # nothing changed


def test_crop_needs_no_model(capsys, place):
    status, out, _ = run(capsys, "crop", place / "manual.sqz", "--tokens", "-101", "--json")
    record = json.loads(out)
    assert status == 0 and (record["tokens"], record["dropped"], record["read"]) == (300, 101, 0)
    assert len(squeezed.load(place / "manual.sqz", tiny_model()).tokens) == 300
    assert "tokens: expected 1 to 300" in refused(capsys, "crop", place / "manual.sqz", "-t", "301")


def test_a_killed_append_leaves_the_old_context_or_the_new_one(place):
    """Half of the kills fall into the work, the others into the writing."""
    old, path, draw = context(), place / "manual.sqz", random.Random(0)
    settings = {"method": "dense"}
    started = time.monotonic()
    new = old.append(tiny_model(), tiny_tokenizer(), MORE, **settings)
    worked = time.monotonic()
    new.save(path)
    seconds = worked - started, time.monotonic() - worked
    found = []
    for kill in range(KILLS):
        old.save(path)
        ready, writes = os.pipe()
        child = os.fork()
        if not child:
            made = new
            if kill % 2 == 0:
                os.write(writes, b"x")
                made = old.append(tiny_model(), tiny_tokenizer(), MORE, **settings)
            os.write(writes, b"x")
            made.save(path)
            os._exit(0)
        os.read(ready, 1)
        time.sleep(draw.uniform(0, 1.1) * seconds[kill % 2])
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        loaded = squeezed.load(path, tiny_model())
        found.append(next((c for c in (old, new) if same_context(loaded, c)), None))
    assert all(each is not None for each in found) and any(each is old for each in found)
    new.save(path)
    left = set(os.listdir(place)) - {"manual.sqz", "model", "chapter.txt"}
    assert {*os.listdir(path)} == listed_files(path)
    assert not left or unnamed(place) is None
