"""What clients send besides a first question: answers of before, other kinds of content, HEAD."""

import openai
import pytest
from served import serving
from tiny import document, tiny_model, tiny_tokenizer

import squeezed

QUESTION = {"role": "user", "content": "What is alpha?"}
NEXT = {"role": "user", "content": "And beta?"}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    root = tmp_path_factory.mktemp("contexts")
    squeezed.index(tiny_model(), tiny_tokenizer(), document(300)).save(root / "one.sqz")
    with serving(root) as served:
        yield served


def chat(served, messages):
    return served.openai().chat.completions.create(
        model="tiny", messages=messages, extra_body={"context": "one"}
    )


def test_answer_of_a_chat_is_taken_back_as_it_was_given(served):
    """As an object of the client, as all of its fields, and as the two that matter."""
    message = chat(served, [QUESTION]).choices[0].message
    plain = {"role": "assistant", "content": message.content}
    expected = chat(served, [QUESTION, plain, NEXT])
    for again in (message, message.model_dump(), plain | {"tool_calls": [], "annotations": []}):
        found = chat(served, [QUESTION, again, NEXT])
        assert found.choices[0].message.content == expected.choices[0].message.content
        assert found.usage == expected.usage


def test_output_of_a_response_is_taken_back_as_it_was_given(served):
    client, asked = served.openai(), {"model": "tiny", "extra_body": {"context": "one"}}
    first = client.responses.create(input=[QUESTION], **asked)
    plain = {"role": "assistant", "content": first.output_text}
    expected = client.responses.create(input=[QUESTION, plain, NEXT], **asked)
    for again in (first.output, [each.model_dump() for each in first.output]):
        found = client.responses.create(input=[QUESTION, *again, NEXT], **asked)
        assert found.output_text == expected.output_text and found.usage == expected.usage


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
SAID = {"role": "assistant", "content": "a"}
REFUSED = {
    "tool_calls": ([QUESTION, SAID | {"tool_calls": [CALL]}, NEXT], "messages.1.tool_calls"),
    "refusal": ([QUESTION, SAID | {"refusal": "no"}, NEXT], "messages.1.refusal"),
    "no text": ([QUESTION, {"role": "assistant", "content": None}, NEXT], "messages.1.content"),
    "a tool": ([QUESTION, {"role": "tool", "content": "a"}], "messages.1.role"),
    "a picture": (
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url",
          "image_url": {"url": "data:,"}}]}],
        "messages.0.content.1",
    ),
    "a number": ([{"role": "user", "content": 5}], "messages.0.content"),
    "number in a part": (
        [{"role": "user", "content": [{"type": "text", "text": 5}]}], "messages.0.content.0.text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_message_must_not_hold_is_refused_where_it_stands(served, kind):
    messages, place = REFUSED[kind]
    with pytest.raises(openai.BadRequestError) as refused:
        chat(served, messages)
    param = refused.value.param
    assert param == place or (param.startswith(place) and param.count(".") == place.count(".") + 1)


def test_file_in_an_input_is_refused_where_it_stands(served):
    part = {"type": "input_image", "image_url": "data:,"}
    with pytest.raises(openai.BadRequestError) as refused:
        served.openai().responses.create(model="tiny", input=[{"role": "user", "content": [part]}])
    assert refused.value.param.startswith("input.0.content.0.")


def test_head_says_what_get_does_without_the_body(served):
    with served.http() as http:
        for path in ("/", "/health", "/ready", "/v1/contexts", "/v1/contexts/none", "/v1/nothing"):
            get, head = http.get(path), http.head(path)
            assert head.status_code == get.status_code and head.content == b""
            assert head.headers["content-type"] == get.headers["content-type"]


def test_document_with_fields_that_say_nothing_is_taken(served):
    body = {"name": "two", "text": "alpha beta", "title": None, "ttl": None, "pinned": None}
    with served.http() as http:
        job = http.post("/v1/contexts", json=body)
        assert job.status_code == 202 and served.wait(job.json()["id"])["state"] == "done"
        found = http.get("/v1/contexts/two").json()
        assert (found["title"], found["ttl"], found["pinned"]) == (None, None, False)
        http.delete("/v1/contexts/two")
        missing = http.post("/v1/contexts", json=body | {"text": None})
        assert missing.status_code == 400 and missing.json()["error"]["param"] == "text"


def test_document_without_a_type_is_refused_in_whole_words(served):
    with served.http() as http:
        said = http.post("/v1/contexts", content=b"").json()["error"]["message"]
    assert said.endswith("got none")


def test_errors_are_counted_also_those_that_no_route_saw(served):
    def counted():
        with served.http() as http:
            lines = http.get("/metrics").text.splitlines()
        found = [line.split() for line in lines if line.startswith("squeezed_http_errors_total")]
        return {name.split('"')[1]: float(value) for name, value in found}

    before = counted()
    with served.http() as http:
        assert http.get("/v1/nothing").status_code == 404
        assert http.get("/v1/models", headers={"Origin": "http://other"}).status_code == 403
        body = {"model": "tiny", "messages": [QUESTION], "n": 2}
        assert http.post("/v1/chat/completions", json=body).status_code == 400
        assert http.get("/v1/models").status_code == 200
    rose = {status: value - before.get(status, 0) for status, value in counted().items()}
    assert {status: by for status, by in rose.items() if by} == {"400": 1, "403": 1, "404": 1}


def test_memory_of_the_process_is_told(served):
    with served.http() as http:
        lines = dict(line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines()
                     if line.startswith("process_"))  # fmt: skip
    assert float(lines["process_resident_memory_bytes"]) > 1e7
