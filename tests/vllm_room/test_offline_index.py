import pytest
from captured import order, written
from tiny import tiny_tokenizer

import squeezed
from squeezed.cli.app import group
from squeezed.errors import SqueezedError
from squeezed.vllm import offline

TEXT = "a document of many words " * 20


@pytest.fixture
def engine(monkeypatch):
    """An engine that captures a layer by itself; how often it read."""
    reads = []

    def capture(arguments, asked, found):
        reads.append(asked)
        written(found, 1)

    monkeypatch.setattr(offline.launch, "check_installed", lambda: None)
    monkeypatch.setattr(offline, "_tokenizer", lambda name: tiny_tokenizer())
    monkeypatch.setattr(offline, "_arguments", lambda words, on_cpu: words)
    monkeypatch.setattr(offline, "_order", lambda words, asked, place: order(place, layers=1))
    monkeypatch.setattr(offline, "_capture", capture)
    return reads


def test_a_document_is_read_once_however_often_the_rest_fails(engine, tmp_path, monkeypatch):
    lines, target = [], tmp_path / "new" / "x.sqz"
    make = offline.making.run
    monkeypatch.setattr(
        offline.making, "run", lambda *a: {"state": "failed", "why": "the disk is full"}
    )
    with pytest.raises(SqueezedError, match="the disk is full"):
        offline.index("M", TEXT, target, [])
    monkeypatch.setattr(offline.making, "run", make)
    found = offline.index("M", TEXT, target, [], report=lines.append)
    assert len(engine) == 1 and "read before" in lines[0]
    assert squeezed.load(target).tokens.tolist() and found["seconds"]["prefill"] == 1.0
    assert [path.name for path in target.parent.iterdir()] == ["x.sqz"]


def test_an_engine_takes_what_the_document_needs(engine, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(offline, "_arguments", lambda words, on_cpu: seen.append(words))
    offline.index("M", TEXT, tmp_path / "x.sqz", ["--dtype", "float32"])
    (words,) = seen
    asked = engine[0]
    assert words[:2] == ["--model", "M"] and words[-2:] == ["--dtype", "float32"]
    assert words[words.index("--max-model-len") + 1] == str(len(asked.prompt) + 1)
    assert str(tmp_path) in words[words.index("--kv-transfer-config") + 1]


@pytest.mark.parametrize(
    "given, name",
    [
        (["--kv-cache-dtype", "fp8"], "--kv-cache-dtype"),
        (["-pp", "2"], "-pp"),
        (["--worker-extension-cls", "x"], "--worker-extension-cls"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_read(engine, tmp_path, given, name):
    with pytest.raises(SqueezedError, match=name):
        offline.index("M", TEXT, tmp_path / "x.sqz", given)
    assert not engine


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_document_is_refused(engine, tmp_path, text):
    with pytest.raises(SqueezedError, match="empty"):
        offline.index("M", text, tmp_path / "x.sqz", [])


def test_a_place_that_cannot_be_written_is_refused_first(engine, tmp_path):
    (tmp_path / "file").write_text("no context")
    for target in (tmp_path / "file", tmp_path / ".hidden"):
        with pytest.raises(SqueezedError, match="file"):
            offline.index("M", TEXT, target, [])
    assert not engine


def test_the_command_says_what_it_made(engine, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    command = group()
    words = ["vllm", "index", "M", str(text), "-o", str(tmp_path / "x.sqz"), "--dtype", "half"]
    with command.make_context("squeezed", words) as context:
        command.invoke(context)
    out, err = capsys.readouterr()
    assert out.startswith(f"{tmp_path / 'x.sqz'}: 400 tokens (prefill 1.0 s, cluster ")
    assert "reading" in err and "clustering" in err
