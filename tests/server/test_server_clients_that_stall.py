"""Clients that say nothing, half of something, or take nothing of their answer; and slow ones."""

import socket
import threading
import time

import pytest
from served import serving
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.server.connections import Connection

SECONDS = 1
STREAM = (
    b'{"model": "tiny", "context": "one", "prompt": "a", "max_tokens": 800, "stream": true, '
    b'"logprobs": 5}'
)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    root = tmp_path_factory.mktemp("contexts")
    squeezed.index(tiny_model(), tiny_tokenizer(), document(300)).save(root / "one.sqz")
    with serving(root, body_seconds=SECONDS, rows=2, max_answer_tokens=3000) as served:
        yield served


def line_to(served, received=None):
    line = socket.socket()
    if received:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, received)
    line.connect(("127.0.0.1", int(served.base.rpartition(":")[2])))
    line.settimeout(20)
    return line


def request(body, path="/v1/completions", method="POST"):
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


def hung_up(line):
    """What comes until the server closes, and after how long that is."""
    started, found = time.monotonic(), b""
    try:
        while piece := line.recv(1 << 16):
            found += piece
    except ConnectionResetError:
        pass
    return found, time.monotonic() - started


def healthy(line):
    line.sendall(request(b"", "/health", "GET"))
    found = b""
    while b'"ok"}' not in found:
        piece = line.recv(4096)
        assert piece, found
        found += piece
    assert found.startswith(b"HTTP/1.1 200")


BEGINNINGS = {
    "nothing": b"",
    "half a line": b"GET /hea",
    "half a head": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Header: ",
}


@pytest.mark.parametrize("kind", BEGINNINGS)
def test_connection_that_never_says_what_it_wants_is_hung_up_on(served, kind):
    with line_to(served) as line:
        line.sendall(BEGINNINGS[kind])
        found, seconds = hung_up(line)
    assert found == b"" and 0.5 * SECONDS < seconds < 15


def test_head_that_comes_letter_by_letter_is_hung_up_on_too(served):
    with line_to(served) as line, pytest.raises(OSError):
        for _ in range(200):
            line.sendall(b"X")
            time.sleep(0.1)


def test_second_request_that_stops_in_its_head_is_hung_up_on(served):
    with line_to(served) as line:
        healthy(line)
        line.sendall(b"GET /hea")
        found, seconds = hung_up(line)
    assert found == b"" and 0.5 * SECONDS < seconds < 15


def test_connection_that_is_kept_open_between_requests_stays(served):
    with line_to(served) as line:
        for _ in range(3):
            healthy(line)
            time.sleep(0.8 * SECONDS)


def small_buffers(monkeypatch):
    """Let the system keep little of what is not read yet."""
    real = Connection.connection_made

    def made(self, transport):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        real(self, transport)

    monkeypatch.setattr(Connection, "connection_made", made)


def test_clients_that_take_nothing_of_their_answers_free_their_places(served, monkeypatch):
    """More of them than there are places: a client that reads is answered nevertheless."""
    small_buffers(monkeypatch)
    lines = [line_to(served, 4096) for _ in range(4)]
    for line in lines:
        line.sendall(request(STREAM))
    assert served.until(lambda: served.engine.under_way == 4)
    found = served.openai().completions.create(
        model="tiny", prompt="a", max_tokens=3, extra_body={"context": "one"}
    )
    assert found.usage.completion_tokens == 3
    assert served.until(lambda: served.engine.under_way == 0 and not served.engine.loop.lanes, 60)
    for line in lines:
        assert b"[DONE]" not in hung_up(line)[0]
        line.close()


def test_slow_reader_gets_all_of_its_answer_and_delays_nobody(served, monkeypatch):
    small_buffers(monkeypatch)
    body = STREAM.replace(b"800", b"300")
    with line_to(served) as line:
        line.sendall(request(body).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
        expected, _ = hung_up(line)
    found = []

    def read():
        with line_to(served, 4096) as line:
            line.sendall(request(body).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
            while piece := line.recv(2048):
                found.append(piece)
                time.sleep(0.01)

    slow = threading.Thread(target=read)
    slow.start()
    assert served.until(lambda: found)
    for _ in range(3):
        answer = served.openai().completions.create(
            model="tiny", prompt="b", max_tokens=3, extra_body={"context": "one"}
        )
        assert answer.usage.completion_tokens == 3
    slow.join(60)
    whole = b"".join(found)
    assert b"[DONE]" in whole and texts(whole) == texts(expected) and len(texts(whole)) > 100


def texts(answer):
    """The pieces of a stream, without what differs from one to the next."""
    return [part.split(b'"')[0] for part in answer.split(b'"text": "')[1:]]
