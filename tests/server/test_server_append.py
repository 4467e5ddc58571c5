"""Text is put behind a context by a job: a new version, on which nobody falls between two."""

import json
import threading

import pytest
from served import serving
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.server.library.notes import PLACE

TEXT, MORE = document(500), document(120, seed=1)
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "What is alpha?"}]}


def said(http, context="manual"):
    answer = http.post("/v1/chat/completions", json=ASK | {"context": context})
    return answer.json()["choices"][0]["message"]["content"]


def appended(served, http, text=MORE, name="manual"):
    answer = http.post(f"/v1/contexts/{name}/append", json={"text": text})
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/v1/jobs/{answer.json()['id']}"
    return served.wait(answer.json()["id"])


def test_a_context_grows_keeps_its_note_and_answers_as_the_library_does(tmp_path):
    with serving(tmp_path) as served, served.http() as http:
        served.make("manual", TEXT, title="The manual", ttl=1000)
        old = said(http)
        job = appended(served, http)
        assert (job["state"], job["kind"], job["context"]) == ("done", "append", "manual")
        found = http.get("/v1/contexts/manual").json()
        assert (found["tokens"], found["title"], found["ttl"]) == (621, "The manual", 1000)
        new = said(http)
    context = squeezed.load(tmp_path / "manual.sqz", tiny_model())
    assert context.pieces == (501, 120)
    with squeezed.Session(tiny_model(), tiny_tokenizer()) as session:
        whole = {"budget": 0.2, "implementation": "reference", "max_new_tokens": 8}
        assert session.ask(context, "What is alpha?", **whole).text == new.strip() != old.strip()


def test_an_answer_under_way_finishes_on_the_old_version(tmp_path):
    with serving(tmp_path) as served, served.http() as http:
        served.make("manual", TEXT)
        wanted = ASK | {"context": "manual", "max_tokens": 60, "stream": True}
        alone = list(pieces(http, wanted))
        got, begun, go_on = [], threading.Event(), threading.Event()

        def read():
            with served.http() as other:
                for piece in pieces(other, wanted):
                    got.append(piece)
                    begun.set()
                    go_on.wait(60)

        thread = threading.Thread(target=read)
        thread.start()
        assert begun.wait(60)
        assert appended(served, http)["state"] == "done"
        go_on.set()
        thread.join(60)
        assert "".join(got) == "".join(alone)
        assert served.until(lambda: http.get("/v1/contexts/manual").json()["tokens"] == 621)


def pieces(http, body):
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])["choices"][0]["delta"].get("content") or ""


def test_appends_follow_each_other(tmp_path):
    with serving(tmp_path) as served, served.http() as http:
        served.make("manual", TEXT)
        jobs = [
            http.post("/v1/contexts/manual/append", json={"text": f"part {n}. "}).json()["id"]
            for n in range(3)
        ]
        assert [served.wait(job)["state"] for job in jobs] == ["done"] * 3
    grown = squeezed.load(tmp_path / "manual.sqz", tiny_model())
    assert tiny_tokenizer().decode(grown.tokens) == f"<s>{TEXT}part 0. part 1. part 2. "


@pytest.mark.parametrize("saved", [False, True])
def test_a_job_that_was_under_way_is_done_once_after_a_restart(tmp_path, saved):
    """As it lies there when a server was killed before the new version was saved, or just after."""
    with serving(tmp_path) as served, served.http() as http:
        served.make("manual", TEXT)
        base = served.server.library.named("manual").version
        job = appended(served, http)
    if not saved:
        squeezed.index(tiny_model(), tiny_tokenizer(), TEXT).save(tmp_path / "other.sqz")
    place = tmp_path / PLACE / "jobs" / job["id"]
    stored = json.loads((place / "job.json").read_text())
    if not saved:
        context = squeezed.load(tmp_path / "manual.sqz", tiny_model())
        context.crop(501).save(tmp_path / "manual.sqz")
        from squeezed.vllm.catalogue import version_of

        base = version_of(tmp_path / "manual.sqz")
    stored |= {"state": "running", "finished": None, "begun": 1, "base": base}
    (place / "job.json").write_text(json.dumps(stored))
    (place / "document").write_text(MORE)
    with serving(tmp_path) as served:
        assert served.wait(job["id"])["state"] == "done"
    assert len(squeezed.load(tmp_path / "manual.sqz", tiny_model()).tokens) == 621


def test_what_cannot_be_appended_is_refused(tmp_path):
    with serving(tmp_path, max_document_tokens=600) as served, served.http() as http:
        served.make("manual", TEXT)
        assert http.post("/v1/contexts/none/append", json={"text": "x"}).status_code == 404
        for body in ({"text": " "}, {}, {"text": "x", "name": "y"}, {"text": 3}):
            assert http.post("/v1/contexts/manual/append", json=body).status_code in (400, 422)
        failed = appended(served, http)
        assert failed["state"] == "failed" and "at most 600" in failed["error"]
        assert http.get("/v1/contexts/manual").json()["tokens"] == 501


def test_a_context_that_is_removed_meanwhile_does_not_come_back(tmp_path, monkeypatch):
    from squeezed import engine

    with serving(tmp_path) as served, served.http() as http:
        served.make("manual", TEXT)
        inner = engine.append

        def removing(*arguments):
            assert http.delete("/v1/contexts/manual").json()["deleted"]
            return inner(*arguments)

        monkeypatch.setattr(engine, "append", removing)
        assert appended(served, http)["state"] == "failed"
        assert http.get("/v1/contexts").json()["data"] == []
    assert not (tmp_path / "manual.sqz").exists()
