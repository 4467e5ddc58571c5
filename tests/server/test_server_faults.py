"""What may happen while answers are written: clients leave, rows fail, memory and time end."""

import signal
import socket
import subprocess
import sys
import threading
import time

import openai
import pytest
import torch
from served import serving, start
from test_server_answers import alone
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.context import control_tokens
from squeezed.context.storage import tensorfile
from squeezed.server.local import batch as batches
from squeezed.server.local.lane import Lane

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "What is alpha?"}]}
LONG = {"stream": True, "max_tokens": 3000, "extra_body": {"context": "one"}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("contexts")
    context = squeezed.index(tiny_model(), tiny_tokenizer(), document(600))
    context.save(root / "one.sqz")
    return root, context


@pytest.fixture
def served(made):
    with serving(made[0], rows=4, queue=3, max_answer_tokens=3000) as served:
        yield served


def ask(served, **more):
    found = served.openai().chat.completions.create(**ASK, extra_body={"context": "one"}, **more)
    return found.choices[0].message.content


def test_client_that_leaves_a_stream_frees_its_place(served):
    streams = [served.openai().chat.completions.create(**ASK, **LONG) for _ in range(4)]
    for stream in streams:
        next(iter(stream))
    assert served.engine.numbers()["answers_running"] == 4
    for stream in streams:
        stream.close()
    assert served.until(lambda: served.engine.under_way == 0 and not served.engine.loop.lanes)


def test_client_that_leaves_before_the_answer_frees_its_place(served):
    """Not streamed: it hangs up while it waits, of the running ones and of the queue."""
    lines = []
    body = '{"model": "tiny", "context": "one", "max_tokens": 3000, "prompt": "a"}'
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    for _ in range(6):
        line = socket.create_connection(("127.0.0.1", int(served.base.rpartition(":")[2])))
        line.sendall((head + body).encode())
        lines.append(line)
    assert served.until(lambda: served.engine.under_way == 6)
    for line in lines:
        line.close()
    assert served.until(lambda: served.engine.under_way == 0 and not served.engine.loop.lanes)
    assert ask(served)


def test_queue_is_bounded_and_says_when_to_come_again(served):
    streams = [served.openai().chat.completions.create(**ASK, **LONG) for _ in range(4)]
    for stream in streams:
        next(iter(stream))
    waiting = [threading.Thread(target=lambda: ask(served, max_tokens=2)) for _ in range(3)]
    for thread in waiting:
        thread.start()
    assert served.until(lambda: served.engine.under_way == 7)
    with pytest.raises(openai.RateLimitError, match="3 requests wait already") as refused:
        ask(served, max_tokens=2)
    assert int(refused.value.response.headers["Retry-After"]) > 0
    for stream in streams:
        stream.close()
    for thread in waiting:
        thread.join(60)
        assert not thread.is_alive()


def test_contexts_take_turns(made, monkeypatch):
    """One with many long answers does not keep a reader of another one waiting."""
    turns, real = [], Lane.turn
    monkeypatch.setattr(Lane, "turn", lambda self: (turns.append(self), real(self))[1])
    with serving(made[0], rows=4, max_answer_tokens=3000) as served:
        busy = [served.openai().chat.completions.create(**ASK, **LONG) for _ in range(4)]
        for stream in busy:
            next(iter(stream))
        more = [threading.Thread(target=lambda: ask(served, max_tokens=2)) for _ in range(3)]
        for thread in more:
            thread.start()
        assert served.until(lambda: served.engine.under_way == 7)
        found = served.openai().completions.create(model="tiny", prompt="a", max_tokens=5)
        assert found.choices[0].finish_reason == "length"
        # an answer may be told before its place is free
        assert served.until(lambda: served.engine.numbers()["answers_running"] == 4)
        for stream in busy:
            stream.close()
        for thread in more:
            thread.join(60)
    others = [place for place, lane in enumerate(turns) if lane.shared.context is None]
    assert len(others) == 4  # the first one reads its prompt, and writes two of the five tokens
    assert others[-1] - others[0] == 6  # every second turn was the other context's


def failing(monkeypatch, when, error):
    """Let passes of the model fail `when` they hold such rows."""
    real = batches.Batch._pass

    def maybe(self, ids, width, counts):
        if when(self):
            raise error
        return real(self, ids, width, counts)

    monkeypatch.setattr(batches.Batch, "_pass", maybe)


def together(served, questions, **more):
    """Ask all at once; texts, or the exceptions that came."""
    found, start = [None] * len(questions), threading.Barrier(len(questions))

    def one(place):
        start.wait(60)
        try:
            asked = [{"role": "user", "content": questions[place]}]
            answer = served.openai().chat.completions.create(
                model="tiny", messages=asked, extra_body={"context": "one"}, **more
            )
            found[place] = answer.choices[0].message.content
        except openai.APIError as error:
            found[place] = error

    threads = [threading.Thread(target=one, args=(n,)) for n in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


QUESTIONS = ["What is alpha?", "Fail, please", "And beta?"]
MARK = len("Fail, please")


def holds_mark(batch):
    return any("Fail" in tiny_tokenizer().decode(row.ask.ids) for row in batch.rows)


@pytest.mark.parametrize("at", ["prompt", "token"])
@pytest.mark.parametrize("kind", ["memory", "fault"])
def test_row_that_fails_leaves_the_others_their_answers(served, made, monkeypatch, at, kind):
    errors = {
        "memory": torch.OutOfMemoryError("CUDA out of memory"),
        "fault": RuntimeError("a fault at /some/place"),
    }
    started = (lambda b: True) if at == "prompt" else (lambda b: all(b.held))
    failing(monkeypatch, lambda b: holds_mark(b) and started(b), errors[kind])
    first, failed, last = together(served, QUESTIONS, max_tokens=12)
    assert first == alone(made[1], QUESTIONS[0], 12)[1]
    assert last == alone(made[1], QUESTIONS[2], 12)[1]
    assert failed.status_code == (503 if kind == "memory" else 500)
    assert "/some/place" not in str(failed)
    monkeypatch.undo()
    assert ask(served, max_tokens=12) == first
    assert served.engine.under_way == 0


def test_pass_that_fails_half_way_is_taken_up_without_a_trace(served, made, monkeypatch):
    """The first layers have the new tokens, the last ones do not; then it goes on."""
    real, failed = torch.nn.functional.silu, []

    def maybe(x, *given, **more):
        calls.append(1)
        if len(calls) % 10 == 0 and len(failed) < 3:
            failed.append(1)
            raise RuntimeError("not enough memory: you tried to allocate 1 byte")
        return real(x, *given, **more)

    calls = []
    activation = tiny_model().model.layers[1].mlp.act_fn
    monkeypatch.setattr(activation, "forward", maybe)
    found = together(served, QUESTIONS, max_tokens=30)
    monkeypatch.undo()
    assert len(failed) == 3
    for question, text in zip(QUESTIONS, found, strict=True):
        if isinstance(text, str):
            assert text == alone(made[1], question, 30)[1]
        else:
            assert text.status_code == 503
    assert sum(isinstance(text, str) for text in found) >= 2


def test_nan_ends_its_row_alone(served, made, monkeypatch):
    real = batches.Batch.read

    def spoilt(self, pieces, answering):
        logits = real(self, pieces, answering).clone()
        for place, row in enumerate(self.rows):
            if "Fail" in tiny_tokenizer().decode(row.ask.ids):
                logits[place] = float("nan")
        return logits

    monkeypatch.setattr(batches.Batch, "read", spoilt)
    first, failed, last = together(served, QUESTIONS)
    assert first == alone(made[1], QUESTIONS[0])[1] and last == alone(made[1], QUESTIONS[2])[1]
    assert failed.status_code == 500 and failed.code == "nan"


def test_error_in_the_middle_of_a_stream_is_an_event(served, monkeypatch):
    stream = served.openai().chat.completions.create(**ASK, **LONG)
    pieces = iter(stream)
    next(pieces)
    failing(monkeypatch, lambda batch: True, torch.OutOfMemoryError("out of memory"))
    with pytest.raises(openai.APIError, match="no memory left"):
        list(pieces)


def test_shutdown_lets_running_answers_end(made):
    served = start(made[0], max_answer_tokens=3000, grace_seconds=30)
    stream = served.openai().chat.completions.create(**ASK, **LONG | {"max_tokens": 60})
    pieces = iter(stream)
    next(pieces)
    served.runner.leave()
    chunks = list(pieces)
    assert chunks[-1].choices[0].finish_reason == "length"
    served.thread.join(30)
    assert not served.thread.is_alive()
    with pytest.raises(openai.APIConnectionError):
        served.openai().models.list()


def test_shutdown_ends_what_takes_longer_than_the_grace(made):
    served = start(made[0], max_answer_tokens=3000, grace_seconds=0)
    stream = served.openai().chat.completions.create(**ASK, **LONG)
    pieces = iter(stream)
    next(pieces)
    started = time.monotonic()
    served.stop()
    with pytest.raises(openai.APIError, match="the server has ended"):
        list(pieces)
    assert time.monotonic() - started < 15


def test_answers_go_on_at_every_step_of_indexing(made, monkeypatch):
    """A document stands still in the midst of a chunk, between chunks, while it is clustered,
    calibrated and saved: an answer that is being written gets tokens all the same."""
    steps, turned, writing = {}, threading.Event(), threading.Event()
    real_turn = Lane.turn

    def turn(self):
        real_turn(self)
        turned.set()

    def wait_for_tokens(step):
        """Stay here until the engine has had three turns."""
        if steps.get(step) or not writing.is_set():
            return
        steps[step] = all(turned.wait(60) and not turned.clear() for _ in range(3))

    monkeypatch.setattr(Lane, "turn", turn)
    block = tiny_model().model.layers[1].mlp
    real_block, real_write = block.forward, tensorfile.write

    def in_a_pass(x):
        if threading.current_thread().name.startswith("asyncio"):
            wait_for_tokens("inside a chunk")
        return real_block(x)

    def writing_files(*given):
        wait_for_tokens("while saving")
        return real_write(*given)

    monkeypatch.setattr(block, "forward", in_a_pass)
    monkeypatch.setattr(tensorfile, "write", writing_files)
    with serving(made[0], max_answer_tokens=3000) as served, served.http() as http:
        real_index = served.engine.session.index

        def index(text, name, config, template, progress):
            def told(phase, done, total):
                wait_for_tokens(phase)
                progress(phase, done, total)

            return real_index(text, name, config, template, told)

        monkeypatch.setattr(served.engine.session, "index", index)
        stream = served.openai().chat.completions.create(**ASK, **LONG)
        next(iter(stream))
        writing.set()
        job = served.make("new", document(1500))
        writing.clear()
        stream.close()
        http.delete("/v1/contexts/new")
    assert job["state"] == "done"
    expected = ("inside a chunk", "prefill", "cluster", "calibrate", "while saving")
    assert steps == dict.fromkeys(expected, True)


def test_only_prompts_wait_while_a_long_document_is_tokenized(served):
    """Tokenizing holds a lock for as long as it takes; streams and other routes go on."""
    stream = served.openai().chat.completions.create(**ASK, **LONG)
    pieces = iter(stream)
    next(pieces)
    waiting = threading.Thread(target=lambda: ask(served, max_tokens=2))
    with control_tokens._ONE_CALL, served.http() as http:
        waiting.start()
        time.sleep(0.3)
        for _ in range(5):
            assert next(pieces)
        assert http.get("/health").status_code == 200
        assert http.get("/v1/contexts").status_code == 200
        assert waiting.is_alive() and served.engine.under_way == 1
    waiting.join(60)
    assert not waiting.is_alive()
    stream.close()


def saved_model(path):
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def command(root, model, *words):
    place = [sys.executable, "-m", "squeezed.cli", "serve", "--model", str(model)]
    more = ["--contexts", str(root), "--served-name", "tiny", "--implementation", "reference"]
    return [*place, *more, "--port", "0", *words]


def address(process):
    for line in process.stderr:
        if "serving" in line and "http://" in line:
            return line.split()[-1].strip()
    raise AssertionError("the server did not start")


def test_command_serves_ends_by_sigterm_and_survives_kill_9_in_the_middle_of_a_job(tmp_path):
    import httpx

    model = saved_model(tmp_path / "model")
    root = tmp_path / "contexts"

    def run():
        process = subprocess.Popen(command(root, model), stderr=subprocess.PIPE, text=True)
        return process, address(process)

    process, base = run()
    sent = {"name": "manual", "text": document(3900)}
    job = httpx.post(f"{base}/v1/contexts", json=sent, timeout=60).json()["id"]
    process.kill()
    process.wait()
    process, base = run()
    until = time.monotonic() + 120
    while time.monotonic() < until:
        state = httpx.get(f"{base}/v1/jobs/{job}", timeout=60).json()
        if state["state"] not in ("waiting", "running"):
            break
        time.sleep(0.2)
    assert state["state"] == "done", state
    asked = ASK | {"context": "manual", "max_tokens": 4}
    found = httpx.post(f"{base}/v1/chat/completions", json=asked, timeout=60).json()
    assert found["squeezed"]["context"] == "manual"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
