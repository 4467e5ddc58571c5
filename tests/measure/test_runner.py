"""One prefill per document, resumable, and the same scores however questions are batched."""

import json

import pytest
from tiny import document

from measure.examples import HEADER, made_document, runner
from squeezed import engine
from squeezed.errors import SqueezedError
from squeezed.measure.accuracy.results import ResultFile, read_rows
from squeezed.measure.accuracy.runner import limited


def answers(path):
    rows = [row for row in read_rows(path) if row["kind"] == "answer"]
    return {(row["method"], row["budget"], row["question"]): row for row in rows}


def count_indexing(monkeypatch):
    calls, index = [], engine.index
    monkeypatch.setattr(engine, "index", lambda *a, **k: calls.append(1) or index(*a, **k))
    return calls


def test_runner_indexes_a_document_once_for_all_methods(tmp_path, monkeypatch):
    calls = count_indexing(monkeypatch)
    runner(tmp_path / "r.jsonl", ("best", "paper", "quest", "snapkv"), (0.1, 0.2)).run(
        [made_document()]
    )
    assert len(calls) == 1
    assert len(answers(tmp_path / "r.jsonl")) == (4 * 2 + 1) * 3


def test_runner_at_full_budget_agrees_with_dense(tmp_path):
    runner(tmp_path / "r.jsonl", ("best", "quest", "oracle"), (1.0,)).run([made_document()])
    for (method, _, _), row in answers(tmp_path / "r.jsonl").items():
        assert row["scores"]["kl"] < 1e-6 and row["scores"]["top1"] == 1.0, method
        assert row["keys_share"] == pytest.approx(1.0)


def test_runner_at_a_small_budget_differs_from_dense(tmp_path):
    runner(tmp_path / "r.jsonl", ("best", "quest"), (0.05,)).run([made_document()])
    rows = answers(tmp_path / "r.jsonl")
    for method in ("best", "quest"):
        row = rows[method, 0.05, "2"]
        assert row["scores"]["kl"] > 1e-6
        assert 0 < row["keys_share"] < 0.3 and row["keys_share"] < row["bytes_share"] < 1


@pytest.mark.parametrize("method", ["best", "quest", "lazyllm"])
def test_runner_scores_do_not_depend_on_the_batch(tmp_path, method):
    found = []
    for batch in (1, 3):
        path = tmp_path / f"{batch}.jsonl"
        runner(path, (method,), batch=batch).run([made_document()])
        found.append(answers(path))
    for key, row in found[0].items():
        other = found[1][key]
        assert row["prediction"] == other["prediction"]
        assert row["scores"] == pytest.approx(other["scores"], abs=1e-4)


def test_runner_goes_on_where_a_killed_run_stopped(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    runner(path).run([made_document()])
    whole = answers(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:6]) + lines[6][:25])  # killed while writing the sixth answer
    runner(path).run([made_document()])
    again = answers(path)
    assert again.keys() == whole.keys()
    for key, row in whole.items():
        assert row["scores"] == pytest.approx(again[key]["scores"], abs=1e-5)
    kept = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert len(kept) == 1 + len(whole)  # nothing twice, nothing half

    calls = count_indexing(monkeypatch)
    runner(path).run([made_document()])
    assert not calls


def test_runner_skips_and_notes_a_document_that_is_too_long(tmp_path):
    path, long = tmp_path / "r.jsonl", made_document("long")
    long = type(long)(long.id, long.task, document(5000), long.template, long.questions)
    runner(path).run([long, made_document()])
    rows = read_rows(path)
    assert [row["document"] for row in rows if row["kind"] == "skipped"] == ["long"]
    assert "4096 positions" in next(r["reason"] for r in rows if r["kind"] == "skipped")
    assert {row["document"] for row in rows if row["kind"] == "answer"} == {"first"}


def test_runner_measures_errors_of_every_layer(tmp_path):
    path = tmp_path / "r.jsonl"
    runner(path, ("oracle",), (0.05, 0.3), measure_errors=True).run([made_document()])
    rows = [row for row in read_rows(path) if row["kind"] == "layers"]
    assert [len(row["errors"]) for row in rows] == [3, 3]
    means = [sum(e["total"] / e["number"] for e in row["errors"]) for row in rows]
    assert means[0] > means[1] > 0


def test_runner_without_generation_writes_no_predictions(tmp_path):
    path = tmp_path / "r.jsonl"
    runner(path, generate=False).run([made_document()])
    assert all(
        row["prediction"] is None and "f1" not in row["scores"] for row in answers(path).values()
    )


def test_result_file_refuses_another_run(tmp_path):
    ResultFile(tmp_path / "r.jsonl", HEADER)
    with pytest.raises(SqueezedError, match=r"output: .* model 'tiny', this one has 'other'"):
        ResultFile(tmp_path / "r.jsonl", HEADER | {"model": "other"})


def test_result_file_names_a_damaged_line(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"kind": "header"}\nnonsense\n{"kind": "answer"}\n')
    with pytest.raises(SqueezedError, match=r"line 2: expected a result row"):
        read_rows(path)


def test_limited_counts_documents_per_task():
    documents = [made_document(str(i)) for i in range(3)]
    found = list(limited(documents, 2, 1))
    assert [d.id for d in found] == ["0", "1"] and all(len(d.questions) == 1 for d in found)
