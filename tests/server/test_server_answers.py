"""Answers through OpenAI's own client: those that the same question gets alone."""

import threading

import openai
import pytest
import torch
from served import serving
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.server.local.words import Words

QUESTIONS = ["What is alpha?", "And beta, which stands behind gamma, what of that?", "Mu?"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two contexts, saved, and the directory that they lie in."""
    root, found = tmp_path_factory.mktemp("contexts"), {}
    for name, seed in (("one", 0), ("two", 1)):
        found[name] = squeezed.index(tiny_model(), tiny_tokenizer(), document(600, seed))
        found[name].save(root / f"{name}.sqz")
    return root, found


@pytest.fixture(scope="module")
def served(made):
    with serving(made[0], rows=4) as served:
        yield served


def alone(context, question, new=8, budget=0.2):
    """What `squeezed.generate` says, as the server writes it."""
    answer = squeezed.generate(
        tiny_model(), tiny_tokenizer(), context, question, budget=budget,
        implementation="reference", max_new_tokens=new,
    )  # fmt: skip
    return answer, text_of(answer.tokens.tolist())


def text_of(tokens, stops=()):
    words = Words(tiny_tokenizer(), stops)
    return "".join(map(words.add, tokens)) + words.rest()


def ask(served, context, question, **more):
    extra = {"context": context, **more.pop("extra", {})}
    return served.openai().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": question}], extra_body=extra, **more
    )


@pytest.mark.parametrize("name", ["one", "two"])
def test_answer_is_that_of_generate(served, made, name):
    for question in QUESTIONS:
        expected, text = alone(made[1][name], question)
        found = ask(served, name, question)
        assert found.choices[0].message.content == text
        assert found.choices[0].finish_reason == "length"
        told = found.squeezed
        assert told["context"] == name and told["matched"] == "name" and told["budget"] == 0.2
        assert told["budget_spent"] == pytest.approx(expected.spending.budget)
        usage = found.usage
        assert usage.prompt_tokens_details.cached_tokens == len(made[1][name].tokens)
        assert usage.completion_tokens == 8
        assert usage.total_tokens == usage.prompt_tokens + 8


def test_stream_is_the_whole_answer_in_pieces(served, made):
    whole = ask(served, "one", QUESTIONS[0])
    options = {"include_usage": True}
    chunks = list(ask(served, "one", QUESTIONS[0], stream=True, stream_options=options))
    texts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(texts) == whole.choices[0].message.content and len([t for t in texts if t]) > 2
    *_, last, counted = chunks
    assert last.choices[0].finish_reason == "length"
    assert last.squeezed["budget_spent"] == whole.squeezed["budget_spent"]
    assert counted.choices == [] and counted.usage == whole.usage


def test_answers_written_together_are_those_that_each_gets_alone(served, made):
    """Ten at once over two contexts, four at most together, with budgets and lengths of their own:
    they join and leave between others' tokens."""
    cases = [
        (name, QUESTIONS[number % 3], 3 + 5 * number, budget)
        for number, (name, budget) in enumerate(
            (n, b) for n in ("one", "two") for b in (0.2, 0.05, 0.2, 1.0, 0.5)
        )
    ]
    expected = [alone(made[1][n], q, new, b)[1] for n, q, new, b in cases]
    found, start = {}, threading.Barrier(len(cases))

    def one(number):
        name, question, new, budget = cases[number]
        start.wait(60)
        answer = ask(served, name, question, max_tokens=new, extra={"budget": budget})
        found[number] = answer.choices[0].message.content, answer.squeezed["budget"]

    threads = [threading.Thread(target=one, args=(n,)) for n in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(len(cases))] == [
        (text, case[3]) for text, case in zip(expected, cases, strict=True)
    ]
    assert served.engine.under_way == 0


def test_longest_context_that_begins_the_prompt_is_used_by_itself(served, made):
    text = document(600, 0) + "\n\nQuestion: " + QUESTIONS[0]
    client = served.openai()
    found = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": text}]
    )
    assert found.squeezed["context"] == "one" and found.squeezed["matched"] == "prefix"
    assert found.choices[0].message.content == alone(made[1]["one"], QUESTIONS[0])[1]
    ids = torch.cat([made[1]["two"].tokens, torch.tensor([65, 66, 67])]).tolist()
    found = client.completions.create(model="tiny", prompt=ids)
    assert found.squeezed["context"] == "two" and found.usage.prompt_tokens == len(ids)
    found = client.completions.create(model="tiny", prompt=ids, extra_body={"context": "none"})
    assert found.squeezed["context"] is None
    assert found.usage.prompt_tokens_details.cached_tokens == 0


def test_dense_answer_without_a_context_is_that_of_the_model(served):
    prompt = "The quick brown fox"
    ids = tiny_tokenizer()("<s>" + prompt, return_tensors="pt", add_special_tokens=False)
    expected = tiny_model().generate(**ids, max_new_tokens=6, do_sample=False)
    found = served.openai().completions.create(model="tiny", prompt=prompt, max_tokens=6)
    assert found.choices[0].text == text_of(expected[0, ids["input_ids"].shape[1] :].tolist())


def test_unknown_model_and_context_are_404(served):
    with pytest.raises(openai.NotFoundError, match="model: expected 'tiny'"):
        served.openai().completions.create(model="other", prompt="a")
    with pytest.raises(openai.NotFoundError, match="none called 'three'; there are: one, two"):
        ask(served, "three", "What?")


@pytest.mark.parametrize("family", ["gemma3", "qwen3"])
def test_other_families_answer_together_as_alone(family, tmp_path):
    """Sliding windows too, over a context and without one."""
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    context = squeezed.index(model, tokenizer, document(600))
    context.save(tmp_path / "one.sqz")
    asked = {"budget": 0.2, "implementation": "reference", "max_new_tokens": 10}
    expected = [squeezed.generate(model, tokenizer, context, q, **asked) for q in QUESTIONS]
    prompts = ["The quick brown fox", "a", "What is alpha? " * 5]
    dense = []
    for prompt in prompts:
        ids = tokenizer("<s>" + prompt, return_tensors="pt", add_special_tokens=False)
        made = model.generate(**ids, max_new_tokens=10, do_sample=False)
        dense.append(text_of(made[0, ids["input_ids"].shape[1] :].tolist()))
    found = {}
    with serving(tmp_path, model=model, answer_tokens=10) as served:

        def named(place):
            answer = ask(served, "one", QUESTIONS[place])
            found["one", place] = answer.choices[0].message.content

        def plain(place):
            answer = served.openai().completions.create(model="tiny", prompt=prompts[place])
            found["none", place] = answer.choices[0].text

        works = [threading.Thread(target=w, args=(n,)) for n in range(3) for w in (named, plain)]
        for work in works:
            work.start()
        for work in works:
            work.join()
    for place in range(3):
        assert found["one", place] == text_of(expected[place].tokens.tolist())
        assert found["none", place] == dense[place]


def test_long_prompt_is_read_in_pieces_and_others_go_on(served, made):
    """Longer than a chunk: the same answer alone and beside others."""
    long = document(1300, 5)
    whole = ask(served, "one", long)
    assert whole.usage.prompt_tokens > 601 + 1300
    found = {}

    def one(name, question):
        found[name] = ask(served, "one", question).choices[0].message.content

    works = [
        threading.Thread(target=one, args=pair)
        for pair in (("long", long), ("short", QUESTIONS[0]), ("again", long))
    ]
    for work in works:
        work.start()
    for work in works:
        work.join()
    assert found["long"] == found["again"] == whole.choices[0].message.content
    assert found["short"] == alone(made[1]["one"], QUESTIONS[0])[1]
