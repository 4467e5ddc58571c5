"""Suites: the needles are where they should be, prompts fit, bad data is named."""

import json
import re
from collections import Counter

import pytest
from tiny import tiny_tokenizer

from squeezed.errors import SqueezedError
from squeezed.measure.accuracy.examples import SuiteOptions
from squeezed.measure.accuracy.suites import SUITES, suite_named
from squeezed.measure.accuracy.suites.longbench_prompts import TASKS
from squeezed.measure.accuracy.suites.ruler_needles import NEEDLE_TASKS

SENTENCES = " ".join(f"Essay sentence number {i} says little." for i in range(3000))


@pytest.fixture
def ruler_data(tmp_path):
    (tmp_path / "essays.txt").write_text(SENTENCES)
    paragraph = {
        "context": "Paris is in France.",
        "qas": [{"question": "Where is Paris?", "answers": [{"text": "France"}]}],
    }
    others = [{"context": f"Paragraph {i} about nothing.", "qas": []} for i in range(40)]
    (tmp_path / "squad.json").write_text(
        json.dumps({"data": [{"paragraphs": [paragraph, *others]}]})
    )
    row = {"question": "Who?", "answer": "Ann", "context": [["Ann", ["Ann did it."]]]}
    rest = [{"question": "?", "answer": "x", "context": [[f"T{i}", ["Text."]]]} for i in range(40)]
    (tmp_path / "hotpotqa.json").write_text(json.dumps([row, *rest]))
    return tmp_path


def ask(name, data, tokens=1500, **options):
    return list(SUITES[name].documents(SuiteOptions(data, tokens, **options), tiny_tokenizer()))


def total_tokens(document):
    tokenizer, template = tiny_tokenizer(), document.template
    question = document.questions[0]
    found = len(template.document_ids(tokenizer, document.text))
    return found + len(template.question_ids(tokenizer, question.text)) + question.max_new_tokens


@pytest.mark.parametrize("task", SUITES["ruler"].tasks)
def test_ruler_task_fits_its_length_and_holds_its_answers(task, ruler_data):
    pytest.importorskip("wonderwords")
    tokens = 6000 if task == "cwe" else 2500
    documents = ask("ruler", ruler_data, tokens, tasks=(task,), documents=2)
    assert [d.id for d in documents] == [f"{task}-0", f"{task}-1"]
    for document in documents:
        assert 0.8 * tokens < total_tokens(document) <= tokens or task.startswith("qa")
        assert all(answer in document.text for answer in document.questions[0].answers)
    assert documents[0].text != documents[1].text


@pytest.mark.parametrize("task", NEEDLE_TASKS)
def test_ruler_needles_are_as_many_as_the_task_says(task, ruler_data):
    pytest.importorskip("wonderwords")
    spec = NEEDLE_TASKS[task]
    document = ask("ruler", ruler_data, 2500, tasks=(task,), documents=1)[0]
    needles = re.findall(r"special magic \w+ for ([\w-]+) is: ([\w-]+)\.", document.text)
    asked = document.questions[0]
    assert len(asked.answers) == spec.values * spec.queries
    assert {value for key, value in needles if key in asked.text} == set(asked.answers)
    if spec.hay != "needles":
        assert len(needles) == max(spec.keys, spec.queries) * spec.values


def test_ruler_variable_chain_can_be_followed(ruler_data):
    document = ask("ruler", ruler_data, 2500, tasks=("vt",), documents=1)[0]
    value = re.search(r"assigned the value (\d+)", document.questions[0].text).group(1)
    held = {}
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", document.text):
        held[name] = held.get(source, source)  # a link must come after what it refers to
    assert {n for n, v in held.items() if v == value} == set(document.questions[0].answers)


@pytest.mark.parametrize("task", ["cwe", "fwe"])
def test_ruler_frequent_words_are_the_most_frequent(task, ruler_data):
    pytest.importorskip("wonderwords")
    document = ask("ruler", ruler_data, 6000, tasks=(task,), documents=1)[0]
    answers = document.questions[0].answers
    counts = Counter(re.findall(r"[a-z]+", document.text))
    assert {word for word, _ in counts.most_common(len(answers))} == set(answers)


def test_ruler_is_the_same_for_the_same_seed_only(ruler_data):
    pytest.importorskip("wonderwords")
    first, again, other = (
        ask("ruler", ruler_data, 1500, tasks=("niah_single_1",), documents=1, seed=seed)[0]
        for seed in (1, 1, 2)
    )
    assert first == again and first.text != other.text


def test_niah_asks_for_each_of_eight_needles(ruler_data):
    pytest.importorskip("wonderwords")
    documents = ask("niah", ruler_data / "essays.txt", 2500, documents=2)
    for document in documents:
        assert len(document.questions) == 8
        for question in document.questions:
            sentence = f"for {question.id} is: {question.answers[0]}."
            assert document.text.count(sentence) == 1
            assert question.text.endswith("mentioned in the provided text is")


def test_fidelity_windows_follow_each_other(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(SENTENCES[:4000])
    documents = ask("fidelity", path, 1000)
    assert len(documents) == 3
    shown = [d.text + d.questions[0].text + d.questions[0].forced for d in documents]
    assert "".join(shown) == SENTENCES[: len("".join(shown))]
    with pytest.raises(SqueezedError, match="no text longer than 9000"):
        ask("fidelity", path, 9000)


def write_prefixqa(folder, pairs):
    (folder / "papers_text.json").write_text(json.dumps({"A": "Long text.", "B": "Short."}))
    (folder / "qa_pairs.json").write_text(json.dumps(pairs))
    return folder


def test_prefixqa_goes_from_short_to_long_papers(tmp_path):
    data = write_prefixqa(tmp_path, {"A": {"What?": ["this", "that"]}, "B": {"Why?": ["so"]}})
    documents = ask("prefixqa", data)
    assert [d.id for d in documents] == ["B", "A"]
    assert documents[1].questions[0].answers == ("this", "that")
    assert documents[1].questions[0].forced == "this"


def test_prefixqa_names_file_and_field_of_a_wrong_schema(tmp_path):
    data = write_prefixqa(tmp_path, {"A": {"What?": "this"}, "B": {}})
    with pytest.raises(
        SqueezedError, match=r"qa_pairs.json: line 1: field 'What\?': expected list"
    ):
        ask("prefixqa", data)


def published(folder, task, **changes):
    row = {"input": "INPUT", "context": "word " * 3000, "answers": ["yes"], "all_classes": None}
    (folder / f"{task}.jsonl").write_text(json.dumps(row | changes) + "\n")
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_longbench_prompt_is_whole_but_for_its_middle(task, tmp_path):
    published(tmp_path, task, context="BEGIN " + "word " * 3000 + "END")
    document = ask("longbench", tmp_path, 2500)[0]
    assert total_tokens(document) <= 2500
    assert document.text.startswith("BEGIN") and document.text.endswith("END")
    prompt = document.template.before + document.text + document.questions[0].text
    before, _, after = TASKS[task].prompt.partition("{context}")
    assert prompt.startswith(before) or before in prompt
    assert prompt.endswith(after.replace("{input}", "INPUT"))


def test_longbench_takes_whole_prompts_apart(tmp_path):
    prompt = (
        TASKS["hotpotqa"].prompt.replace("{context}", "The passages.").replace("{input}", "Who?")
    )
    rows = {"0": {"origin_prompt": prompt, "gold": ["Ann"]}}
    (tmp_path / "Some_hotpotqa.json").write_text(json.dumps(rows))
    document = ask("longbench", tmp_path, 4000)[0]
    assert document.text == "The passages."
    assert document.questions[0].text.endswith("Question: Who?\nAnswer:")


def test_longbench_names_line_and_field_of_a_wrong_schema(tmp_path):
    published(tmp_path, "trec", answers="yes")
    with pytest.raises(SqueezedError, match=r"trec.jsonl: line 1: field 'answers': expected list"):
        ask("longbench", tmp_path)


@pytest.mark.parametrize("name", ["fidelity", "niah", "prefixqa"])
def test_suite_without_its_data_says_what_it_needs(name, tmp_path):
    with pytest.raises(SqueezedError, match="give --data"):
        ask(name, None)
    with pytest.raises(SqueezedError, match="found nothing"):
        ask(name, tmp_path / "missing")


def test_unknown_suite_and_task_list_the_known_ones(ruler_data):
    with pytest.raises(SqueezedError, match=r"suite: expected one of fidelity, .*got 'rules'"):
        suite_named("rules")
    with pytest.raises(SqueezedError, match=r"tasks: ruler has niah_single_1.*got 'niah'"):
        ask("ruler", ruler_data, tasks=("niah",))
