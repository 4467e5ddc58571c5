"""The demo: its document, its measure of agreement, and one real run of all of it."""

import json

import pytest
import torch
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.cli import main
from squeezed.demo.run import QUESTIONS, run_demo
from squeezed.demo.run import document as demo_document
from squeezed.errors import SqueezedError
from squeezed.hf.asking import Asking
from squeezed.measure.agreement import compare, next_token_logits


@pytest.fixture(scope="module")
def context():
    return squeezed.index(tiny_model("llama"), tiny_tokenizer(), document(700))


def ids_of(text):
    return torch.tensor(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])


def test_compare_of_equal_logits_is_full_agreement():
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    same = compare(logits, logits, logits.argmax(-1))
    assert same.identical == 1.0 and same.kl == pytest.approx(0.0, abs=1e-6) and same.tokens == 5


def test_compare_follows_the_formula():
    dense, other = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 2.0], [0.0, 3.0]])
    p, q = dense.double().softmax(-1), other.double().softmax(-1)
    found = compare(dense, other, torch.tensor([0, 1]))
    assert found.identical == 0.5
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)


def test_next_token_logits_of_everything_kept_are_the_models_own(context):
    model, question, answer = tiny_model("llama"), ids_of("What is alpha?"), ids_of("beta")
    cache = context.cache(1.0, implementation="reference")
    found = next_token_logits(model, cache, question, answer)
    with torch.inference_mode():
        whole = model(torch.cat([context.tokens, question, answer])[None]).logits[0]
    expected = whole[-len(answer) - 1 : -1]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_next_token_logits_select_token_by_token_as_decoding_does(context):
    model, question, answer = tiny_model("llama"), ids_of("What is alpha?"), ids_of(document(90))
    forced = context.cache(0.1, implementation="reference")
    together = next_token_logits(model, forced, question, answer)
    stepped = context.cache(0.1, implementation="reference")
    rows = [next_token_logits(model, stepped, question, answer[:1])]
    for token in answer[:-1]:  # 90 tokens: more than select alone in a longer input
        rows.append(next_token_logits(model, stepped, token[None], answer[:1]))
    torch.testing.assert_close(together, torch.cat(rows), rtol=1e-3, atol=1e-3)


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
