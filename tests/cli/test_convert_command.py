"""`squeezed convert`, `index --rows` and what `inspect` and `plan` say of encoded rows."""

import json

import pytest
from test_cli import refused, run
from tiny import document, tiny_model, tiny_tokenizer

import squeezed


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a model, a document and a saved context."""
    root = tmp_path_factory.mktemp("convert")
    tiny_model().save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    (root / "manual.txt").write_text(document(500), encoding="utf-8")
    squeezed.index(tiny_model(), tiny_tokenizer(), document(500)).save(root / "manual.sqz")
    return root


def test_convert_writes_fewer_bits_and_the_answer_reads_them(capsys, place):
    small = place / "small.sqz"
    words = "convert", place / "manual.sqz", "--rows", "int4", "-o", small, "--json"
    status, out, _ = run(capsys, *words)
    record = json.loads(out)
    assert status == 0 and record["rows"] == "int4"
    assert record["kv_bytes"] < record["kv_bytes_before"] == kv_bytes(place / "manual.sqz")
    assert record["kv_bytes"] == kv_bytes(small)
    assert 0.005 < record["rows_loss"]["mean"] <= record["rows_loss"]["largest"] < 0.2
    asked = ("ask", small, "mu?", "-m", place / "model", "-n", 3, "-b", 0.3, "--json")
    status, out, _ = run(capsys, *asked)
    assert status == 0 and isinstance(json.loads(out)["answer"], str)
    status, out, _ = run(capsys, "inspect", small)
    assert status == 0 and "rows as int4: outputs on the probe are" in out


def kv_bytes(path):
    return squeezed.load(path).kv_bytes()


def test_index_with_rows_is_index_then_convert(capsys, place):
    direct = place / "direct.sqz"
    words = "index", place / "manual.txt", "-m", place / "model", "-o", direct, "--rows", "int8"
    status, _, _ = run(capsys, *words, "--dtype", "float32")
    assert status == 0
    made = squeezed.load(place / "manual.sqz", rows="int8")
    found = squeezed.load(direct)
    assert found.rows == made.rows == "int8" and found.rows_loss == made.rows_loss
    for one, other in zip(found.clustered_layers, made.clustered_layers, strict=True):
        assert one.rows.codes.keys.equal(other.rows.codes.keys)


def test_plan_counts_the_bits(capsys):
    found = {}
    for rows in ("plain", "int4"):
        status, out, _ = run(capsys, "plan", "demo", "-c", 131072, "--rows", rows, "--json")
        assert status == 0
        found[rows] = json.loads(out)
    plain, small = found["plain"], found["int4"]
    assert small["rows"] == "int4"
    assert 0.25 < small["kv_bytes"] / plain["kv_bytes"] < 0.28
    assert small["dense_bytes_per_token"] == plain["dense_bytes_per_token"]
    assert small["squeezed_bytes_per_token"] < 0.6 * plain["squeezed_bytes_per_token"]


def test_what_cannot_be_converted_is_refused_before_any_work(capsys, place):
    source, target = place / "manual.sqz", place / "no.sqz"
    line = refused(capsys, "convert", source, "--rows", "int3", "-o", target)
    assert "rows: expected one of plain, int8, int4, got 'int3'" in line
    run(capsys, "convert", source, "--rows", "int4", "-o", place / "four.sqz")
    line = refused(capsys, "convert", place / "four.sqz", "--rows", "int8", "-o", target)
    assert "needs plain keys and values, this context has 'int4'" in line
    line = refused(
        capsys, "append", place / "four.sqz", place / "manual.txt", "-m", place / "model"
    )
    assert "a context that grows needs plain keys and values" in line
    line = refused(
        capsys, "ask", place / "four.sqz", "mu?", "-m", place / "model", "--method", "quest"
    )
    assert "plain keys and values" in line
    assert not target.exists()
