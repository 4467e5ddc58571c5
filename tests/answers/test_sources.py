"""Sources: attention mass by position, and the passages it falls on."""

from itertools import pairwise

import pytest
import torch
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.answers.reading import answer_queries, budget_by_head, traffic
from squeezed.answers.sources import ask_neutral, attention_by_position, passage_bounds, sources
from squeezed.errors import SqueezedError
from squeezed.hf.answer import respond

NEEDLE = "Omega is the last letter. "


@pytest.fixture(scope="module")
def context():
    text = document(500) + ". " + NEEDLE + document(400, seed=1)
    return squeezed.index(tiny_model("llama"), tiny_tokenizer(), text)


def answered(context, budget=0.2, method="squeezed", tokens=5):
    cache = context.cache(budget, implementation="reference", method=method)
    cache.watch_queries()
    ids = context.template.question_ids(tiny_tokenizer(), "What is omega?")
    answer = respond(tiny_model("llama"), tiny_tokenizer(), cache, ids, max_new_tokens=tokens)
    return cache, answer


def test_attention_by_position_equals_a_dense_softmax(context):
    cache, _ = answered(context)
    mass, _ = attention_by_position(context, cache)
    expected = torch.zeros(len(context.tokens), dtype=torch.float64)
    for entry in cache.context_layers:
        layer, query = entry.context.layer, answer_queries(entry)[0]
        for head, rows in enumerate(query):
            kv = head // (query.shape[0] // layer.keys.shape[0])
            weight = (layer.scale * rows.double() @ layer.keys[kv].double().T).softmax(-1).mean(0)
            expected[layer.positions[kv].long()] += weight
    expected[: context.config.clustering.pinned_first] = 0
    torch.testing.assert_close(mass, expected / expected.sum(), rtol=1e-4, atol=1e-8)


def test_answer_queries_are_one_per_answer_token(context):
    cache, answer = answered(context, tokens=5)
    assert answer_queries(cache.context_layers[0]).shape[2] == len(answer.tokens) == 5


def test_rows_read_agree_with_the_keys_counted(context):
    cache, _ = answered(context, tokens=1)
    cache.restart_spending()
    cache.watch_queries()
    respond(
        tiny_model("llama"), tiny_tokenizer(), cache, torch.tensor([65]), max_new_tokens=1
    )  # one query token: what it read is what was counted
    assert float(budget_by_head(context, cache).mean()) == pytest.approx(
        cache.spending().budget, rel=1e-5
    )


def test_passages_cover_the_document_once(context):
    bounds = passage_bounds(tiny_tokenizer(), context.tokens)
    assert bounds[0][0] == 0 and bounds[-1][1] == len(context.tokens)
    assert all(left[1] == right[0] for left, right in pairwise(bounds))


def test_sources_shares_sum_to_one_and_a_neutral_answer_has_no_excess(context):
    cache, _ = answered(context)
    neutral = context.cache(0.2, implementation="reference")
    ask_neutral(tiny_model("llama"), tiny_tokenizer(), context, neutral)
    found = sources(tiny_tokenizer(), context, cache, neutral, count=1000)
    assert sum(passage.share for passage in found) == pytest.approx(1.0)
    assert sum(passage.excess for passage in found) == pytest.approx(0.0, abs=1e-9)
    same = sources(tiny_tokenizer(), context, neutral, neutral, count=1000)
    assert all(passage.excess == 0 for passage in same)


def test_sources_of_a_peaked_attention_are_the_passage_it_looks_at(context):
    cache, _ = answered(context)
    neutral, _ = answered(context)
    start = next(a for a, b in passage_bounds(tiny_tokenizer(), context.tokens) if b > 520)
    for entry in cache.context_layers:
        layer = entry.context.layer
        group = entry.watch[0].shape[1] // layer.keys.shape[0]
        row = (layer.positions == start + 5).nonzero()[:, 1]
        key = layer.keys[torch.arange(len(row)), row]
        entry.watch = [50 * key.repeat_interleave(group, 0)[None, :, None]]
    best = sources(tiny_tokenizer(), context, cache, neutral, count=1)[0]
    assert best.start == start and best.share > 0.5


def test_sources_without_watched_queries_say_what_to_do(context):
    with pytest.raises(SqueezedError, match="watch_queries"):
        attention_by_position(context, context.cache(0.2))


def test_traffic_is_everything_when_dense_and_less_at_a_budget(context):
    dense = traffic(context, answered(context, budget=1.0)[0])
    tenth = traffic(context, answered(context, budget=0.1)[0])
    assert dense.total == dense.dense == context.kv_bytes()
    assert 0 < tenth.exact < dense.exact and 0 < tenth.index < context.index_bytes()


SENTENCES = {
    "Korean": "문서를 한 번 읽고 여러 번 묻는다. 모든 키를 매번 읽을 필요가 없다! ",
    "Chinese": "文书读一次，问多次。为什么？因为快！",
    "Japanese": "これは「長い。」文です。質問しますか？",
    "Arabic": "هل هذا نص طويل؟ نعم هذا نص۔ ",
    "Hindi": "यह एक वाक्य है। दूसरा वाक्य यहाँ है॥ ",
    "Amharic": "ይህ ጽሑፍ ነው። ",
}


@pytest.mark.parametrize("script", SENTENCES)
def test_passages_end_with_the_scripts_sentences(script):
    text, tokenizer = SENTENCES[script] * 20, tiny_tokenizer()
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    parts = [tokenizer.decode(tokens[a:b]) for a, b in passage_bounds(tokenizer, tokens)]
    assert "".join(parts) == text and len(parts) > 5
    assert all(part.rstrip(" 」")[-1] in ".!。？！؟۔।॥።" for part in parts[:-1])


@pytest.mark.parametrize("text", ["จำนวนมาก" * 60, "👩‍👩‍👧‍👦" * 30, "é" * 200, "ẵ" * 200])
def test_passages_without_sentences_are_cut_between_characters(text):
    tokenizer = tiny_tokenizer()
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    bounds = passage_bounds(tokenizer, tokens)
    parts = [tokenizer.decode(tokens[a:b]) for a, b in bounds]
    assert "".join(parts) == text and len(parts) > 2
    assert not any("\ufffd" in part or part[0] in "\u200d\u0301\u0e33" for part in parts)


def test_passages_of_byte_fallback_tokens_hold_whole_characters():
    class Bytes:
        def convert_ids_to_tokens(self, token):
            return f"<0x{token:02X}>"

        def decode(self, tokens):
            return bytes(int(token) for token in tokens).decode("utf-8", "replace")

    tokens = torch.tensor(list(("漢字" * 60).encode()))
    parts = [Bytes().decode(tokens[a:b]) for a, b in passage_bounds(Bytes(), tokens)]
    assert "".join(parts) == "漢字" * 60 and len(parts) > 2
    assert not any("\ufffd" in part for part in parts)
