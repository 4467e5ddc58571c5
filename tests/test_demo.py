"""The demo: its document, and one real run of all of it."""

import json

import pytest
from tiny import tiny_model, tiny_tokenizer

import squeezed
from squeezed.cli import main
from squeezed.demo.run import QUESTIONS, run_demo
from squeezed.demo.run import document as demo_document
from squeezed.errors import SqueezedError
from squeezed.hf.asking import Asking


def test_demo_document_is_plain_text_of_some_length():
    text = demo_document()
    assert text.startswith("Write-Ahead Logging") and 25_000 < len(text) < 35_000
    assert "3.7.0" in text and "network filesystem" in text


def test_quick_demo_asks_one_question_of_the_first_quarter(monkeypatch):
    text = demo_document()[:4000]
    monkeypatch.setattr("squeezed.demo.run.document", lambda: text)
    with squeezed.Session(tiny_model(), tiny_tokenizer()) as session:
        demo = run_demo(session, Asking(implementation="reference"), quick=True)
    record = demo.record()
    assert record["document"] == "the first 25% of sqlite_wal.txt"
    assert [(row["question"], row["budget_asked"]) for row in record["asked"]] == [
        (QUESTIONS[0], 1.0),
        (QUESTIONS[0], 0.1),
    ]
    assert 1000 <= record["tokens"] < 1100  # the tiny model reads bytes


@pytest.mark.slow
def test_demo_runs_the_real_model_on_the_real_document(capsys):
    from squeezed.hf.demo_model import demo_model_directory

    try:
        demo_model_directory()
    except SqueezedError as error:
        pytest.skip(f"the demo model is neither cached nor to be had: {error}")
    assert main(["demo", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert 6_000 <= record["tokens"] < 7_500
    assert record["index_bytes"] <= 0.08 * record["kv_bytes"]
    assert [row["question"] for row in record["asked"][::2]] == list(QUESTIONS)
    assert all(row["agreement"]["identical"] > 0.9 for row in record["asked"][::2])
    for dense, other in zip(record["asked"][::2], record["asked"][1::2], strict=True):
        assert dense["budget_spent"] == 1.0 and dense["bytes_per_token"] == record["kv_bytes"]
        assert 0.05 < other["budget_spent"] < 0.15
        assert other["bytes_per_token"] < 0.25 * record["kv_bytes"]
        assert other["agreement"]["identical"] > 0.8 and other["agreement"]["kl"] < 0.1
