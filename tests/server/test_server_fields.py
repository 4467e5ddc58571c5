"""What a request may say: stops, sampling, logprobs, limits; and what is refused by name."""

import math

import openai
import pytest
import torch
from served import serving
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.answers.sources import (
    NEUTRAL_QUESTION,
    NEUTRAL_TOKENS,
    attention_by_position,
)
from squeezed.server.local.choosing import Chooser
from squeezed.server.port import Sampling

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "What is alpha?"}]}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    root = tmp_path_factory.mktemp("contexts")
    context = squeezed.index(tiny_model(), tiny_tokenizer(), document(600))
    context.save(root / "one.sqz")
    with serving(root, max_prompt_tokens=200, max_answer_tokens=64, max_body_mb=1) as served:
        yield served


def post(served, body, path="/v1/chat/completions", **more):
    with served.http() as http:
        return http.post(path, json=body, **more)


def answered(served, **more):
    found = post(served, ASK | {"context": "one"} | more)
    assert found.status_code == 200, found.text
    return found.json()


def text(found):
    return found["choices"][0]["message"]["content"]


def test_stop_ends_the_answer_before_its_text_and_streams_alike(served):
    whole = text(answered(served, max_tokens=40))
    stop = whole[10:13]
    found = answered(served, max_tokens=40, stop=[stop, "never this"])
    assert text(found) == whole[: whole.index(stop)]
    assert found["choices"][0]["finish_reason"] == "stop"
    client = served.openai()
    chunks = client.chat.completions.create(
        **ASK, max_tokens=40, stop=stop, stream=True, extra_body={"context": "one"}
    )
    parts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(parts) == whole[: whole.index(stop)]


def test_end_token_ends_the_answer_and_is_not_shown(tmp_path):
    model = tiny_model.__wrapped__()
    tokenizer = tiny_tokenizer()
    context = squeezed.index(model, tokenizer, document(600))
    context.save(tmp_path / "one.sqz")
    asked = {"budget": 0.2, "implementation": "reference", "max_new_tokens": 6}
    tokens = squeezed.generate(model, tokenizer, context, "What is alpha?", **asked).tokens
    model.generation_config.eos_token_id = int(tokens[3])
    with serving(tmp_path, model=model) as served:
        found = answered(served, max_tokens=20)
    assert found["choices"][0]["finish_reason"] == "stop"
    assert found["usage"]["completion_tokens"] == tokens.tolist().index(int(tokens[3])) + 1


def test_longest_answer_is_that_of_the_request_then_of_the_settings(served):
    for given, expected in (({}, 8), ({"max_tokens": 3}, 3), ({"max_completion_tokens": 5}, 5)):
        found = answered(served, **given)
        assert found["usage"]["completion_tokens"] == expected
        assert found["choices"][0]["finish_reason"] == "length"


def test_seed_repeats_a_drawn_answer_and_another_seed_does_not(served):
    drawn = [text(answered(served, temperature=1.2, seed=s, max_tokens=24)) for s in (7, 7, 8)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert text(answered(served, temperature=0)) == text(answered(served))


def test_top_p_draws_from_the_likeliest_alone():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    for top_p, allowed in ((0.4, {0}), (0.6, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        chooser = Chooser(Sampling(temperature=1.0, top_p=top_p, seed=1))
        drawn = [chooser.choose(logits).token for _ in range(400)]
        assert set(drawn) == allowed
    share = drawn.count(0) / len(drawn)
    assert share == pytest.approx(0.5, abs=0.1)
    for least in (0.0, 5e-324, 1e-9):
        assert Chooser(Sampling(temperature=least)).choose(logits).token == 0
    sharp = Chooser(Sampling(temperature=0.1, seed=1))
    assert [sharp.choose(logits).token for _ in range(50)].count(0) > 45


def test_logprobs_are_of_the_tokens_and_sorted(served):
    found = answered(served, logprobs=True, top_logprobs=3)
    told = found["choices"][0]["logprobs"]["content"]
    assert len(told) == 8
    for token in told:
        values = [top["logprob"] for top in token["top_logprobs"]]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        assert token["logprob"] == values[0] < 0  # greedy takes the likeliest
        assert sum(math.exp(v) for v in values) < 1
    body = {"model": "tiny", "prompt": "abc", "logprobs": 2, "max_tokens": 4}
    told = post(served, body, "/v1/completions").json()["choices"][0]["logprobs"]
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["text_offset"]) == 4
    assert told["text_offset"] == sorted(told["text_offset"])
    assert answered(served)["choices"][0]["logprobs"] is None


def test_logprobs_equal_those_of_the_model(served):
    ids = tiny_tokenizer()("<s>abc", return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        expected = tiny_model()(ids).logits[0, -1].log_softmax(-1)
    body = {"model": "tiny", "prompt": "abc", "logprobs": 1, "max_tokens": 1}
    told = post(served, body, "/v1/completions").json()["choices"][0]["logprobs"]
    assert told["token_logprobs"][0] == pytest.approx(float(expected.max()), abs=1e-5)


UNSUPPORTED = {
    "n": 2,
    "frequency_penalty": 0.5,
    "presence_penalty": -1,
    "logit_bias": {"50": 1},
    "response_format": {"type": "json_object"},
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "store": True,
    "metadata": {"a": "b"},
    "reasoning_effort": "low",
    "prediction": {"type": "content", "content": "a"},
    "audio": {"voice": "x"},
    "top_k": 5,
    "something_new": 1,
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_unsupported_field_is_refused_by_name(served, field):
    found = post(served, ASK | {field: UNSUPPORTED[field]})
    assert found.status_code == 400
    error = found.json()["error"]
    assert error["param"] == field and error["code"] == "unsupported_field"
    assert error["type"] == "invalid_request_error" and field in error["message"]


def test_fields_that_ask_for_nothing_are_taken(served):
    off = {
        "n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tools": [],
        "response_format": {"type": "text"}, "store": False, "audio": None, "user": "me",
        "temperature": None, "stop": None,
    }  # fmt: skip
    assert text(answered(served, **off)) == text(answered(served))


WRONG = {
    "temperature": 3,
    "top_p": 0,
    "max_tokens": 0,
    "budget": 1.5,
    "seed": "1",
    "stop": "",
    "stream": "yes",
    "top_logprobs": 50,
    "messages": [],
    "preset": "worst",
    "squeezed": {"passage": True},
    "stream_options": {"include_usage": True},
}


@pytest.mark.parametrize("field", WRONG)
def test_wrong_value_is_one_line_that_names_its_field(served, field):
    found = post(served, ASK | {"context": "one", field: WRONG[field]})
    assert found.status_code == 400
    message = found.json()["error"]["message"]
    assert field in message and "\n" not in message


BODIES = {
    "no json": b"{",
    "a list": b"[]",
    "nothing": b"",
    "not finite": b'{"model": "tiny", "prompt": "a", "messages": [], "top_p": NaN}',
    "surrogate": b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "surrogate name": b'{"model": "\\ud800", "messages": [{"role": "user", "content": "a"}]}',
    "deep": b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "not utf-8": b'{"model": "\xff"}',
}


@pytest.mark.parametrize("kind", BODIES)
def test_body_that_is_none_is_400(served, kind):
    with served.http() as http:
        headers = {"Content-Type": "application/json"}
        found = http.post("/v1/chat/completions", content=BODIES[kind], headers=headers)
        assert found.status_code == 400, found.text
        assert found.json()["error"]["message"]
    assert text(answered(served))


def test_limits_on_prompt_and_answer_say_what_is_allowed(served):
    long = [{"role": "user", "content": "a" * 300}]
    found = post(served, ASK | {"messages": long})
    assert found.status_code == 400 and "at most 200 may" in found.json()["error"]["message"]
    assert found.json()["error"]["code"] == "context_length_exceeded"
    found = post(served, ASK | {"max_tokens": 65})
    assert found.status_code == 400 and "at most 64, got 65" in found.json()["error"]["message"]


def test_control_tokens_in_prompts_are_text(served):
    """`</s>` is read as four characters, not as the token that ends a text."""
    body = {"model": "tiny", "prompt": "a</s>b", "max_tokens": 1}
    usage = post(served, body, "/v1/completions").json()["usage"]
    assert usage["prompt_tokens"] == 1 + len("a</s>b")  # and <s> at the beginning
    asked = answered(served, messages=[{"role": "user", "content": "a</s>b"}])
    plain = answered(served, messages=[{"role": "user", "content": "a####b"}])
    assert asked["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]


def test_conversation_equals_a_chat_of_the_session(served):
    with squeezed.Session(tiny_model(), tiny_tokenizer()) as session:
        session.open(served.server.settings.contexts / "one.sqz")
        chat = session.chat("one", 0.2, implementation="reference")
        first = chat.ask("What is alpha?", max_new_tokens=6)
        ids = chat._request("And beta?", {"max_new_tokens": 6}).ids
    said = [("user", "What is alpha?"), ("assistant", "ANSWER"), ("user", "And beta?")]
    prompt = served.server.prompts.chat(said, "one")
    whole = tiny_tokenizer().decode(prompt.ids)
    spoken = tiny_tokenizer().decode(first.tokens)
    assert whole.replace(" ANSWER", spoken) == tiny_tokenizer().decode(ids)


def test_instructions_stand_behind_the_document(served):
    said = [("system", "Be brief."), ("user", "What is alpha?")]
    prompt = served.server.prompts.chat(said, "one")
    expected = "\n\nQuestion: Be brief.\n\nWhat is alpha?\nAnswer:"
    assert tiny_tokenizer().decode(prompt.ids) == expected


def test_passages_of_an_answer_are_those_of_sources(served):
    """Shares and reads of every passage, against `squeezed.answers.sources`."""
    found = answered(served, squeezed={"tokens": True})["squeezed"]
    with squeezed.Session(tiny_model(), tiny_tokenizer()) as session:
        context = session.open(served.server.settings.contexts / "one.sqz")
        asked = {"budget": 0.2, "implementation": "reference", "max_new_tokens": 8}
        answer = session.ask(context, "What is alpha?", watch=True, **asked)
        neutral = asked | {"max_new_tokens": NEUTRAL_TOKENS}
        usual = session.ask(context, NEUTRAL_QUESTION, watch=True, **neutral)
        traffic = session.traffic(answer)
        mass, read = attention_by_position(context, answer.watched)
        expected, _ = attention_by_position(context, usual.watched)
    with served.http() as http:
        cut = http.get("/v1/contexts/one/passages").json()
    assert cut["text"] == document(600)
    assert "".join(cut["text"][p["start"] : p["end"]] for p in cut["data"]) == cut["text"]
    for told, place in zip(found["passages"], cut["data"], strict=True):
        own = slice(*place["tokens"])
        assert told["share"] == pytest.approx(float(mass[own].sum()), abs=1e-4)
        excess = float(mass[own].sum() - expected[own].sum())
        assert told["excess"] == pytest.approx(excess, abs=1e-4)
        assert told["read"] == pytest.approx(float(read[own].mean()), abs=1e-4)
    assert sum(p["share"] for p in found["passages"]) == pytest.approx(1, abs=1e-4)
    assert len(found["tokens"]) == 8
    for token in found["tokens"]:
        assert sum(share for _, share in token["passages"]) == pytest.approx(1, abs=1e-4)
    told = found["bytes_per_token"]
    assert told["exact"] == pytest.approx(traffic.exact, rel=1e-3)
    assert told["index"] == pytest.approx(traffic.index, rel=1e-3)
    assert told["dense"] == traffic.dense


def test_passages_without_a_context_are_refused(served):
    found = post(served, ASK | {"squeezed": {"passages": True}})
    assert found.status_code == 400 and found.json()["error"]["param"] == "squeezed"


def test_other_routes_and_methods_are_errors_of_the_same_kind(served):
    with served.http() as http:
        for method, path, status in (
            ("GET", "/v1/nothing", 404),
            ("GET", "/v1/chat/completions", 405),
            ("POST", "/v1/embeddings", 404),
            ("GET", "/v1/jobs/none", 404),
            ("GET", "/v1/models/other", 404),
        ):
            found = http.request(method, path)
            message = found.json()["error"]["message"]
            assert found.status_code == status and message
            if status == 405:
                assert found.headers["allow"] == "POST" and "expected POST" in message
            assert path != "/v1/nothing" or "nothing at /v1/nothing" in message
    assert [m.id for m in served.openai().models.list()] == ["tiny"]
    assert served.openai().models.retrieve("tiny").id == "tiny"


def test_errors_reach_openais_client_as_its_own(served):
    with pytest.raises(openai.BadRequestError) as refused:
        served.openai().chat.completions.create(**ASK, n=2)
    assert refused.value.param == "n" and refused.value.code == "unsupported_field"


def test_responses_are_the_chats_answers_whole_and_as_events(served):
    expected = text(answered(served, messages=[
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is alpha?"}
    ]))  # fmt: skip
    client = served.openai()
    asked = {
        "model": "tiny", "input": "What is alpha?", "instructions": "Be brief.",
        "max_output_tokens": 8, "extra_body": {"context": "one"},
    }  # fmt: skip
    whole = client.responses.create(**asked)
    assert whole.output_text == expected and whole.squeezed["context"] == "one"
    assert whole.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage.input_tokens_details.cached_tokens == 601
    with client.responses.stream(**asked) as stream:
        pieces = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert "".join(pieces) == expected and len(pieces) > 2
    parts = [{"role": "user", "content": [{"type": "input_text", "text": "What is alpha?"}]}]
    assert client.responses.create(**asked | {"input": parts}).output_text == expected
    for field in ({"previous_response_id": "resp_1"}, {"store": True}, {"tools": [{"type": "x"}]}):
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(**asked, **field)
        assert refused.value.param == next(iter(field))
