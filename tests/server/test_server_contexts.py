"""Documents as resources: made by jobs, listed, renamed, pinned, given a lifetime, removed."""

import io
import json
import shutil
import threading
import time
import zipfile

import docx
import pytest
from served import serving, start
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.server.documents.extract import Limits, text_of_upload
from squeezed.server.library.notes import PLACE

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "What is alpha?"}]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved context of this model, and one of another model."""
    root = tmp_path_factory.mktemp("saved")
    for name, model in (("one", tiny_model()), ("strange", tiny_model(num_hidden_layers=2))):
        squeezed.index(model, tiny_tokenizer(), document(600)).save(root / f"{name}.sqz")
    return root


def ask(served, context):
    with served.http() as http:
        return http.post("/v1/chat/completions", json=ASK | {"context": context})


def texts(served, context):
    return ask(served, context).json()["choices"][0]["message"]["content"]


def test_context_is_made_found_renamed_and_removed(tmp_path):
    with serving(tmp_path) as served, served.http() as http:
        job = served.make("manual", document(600), title="The manual")
        assert job["state"] == "done" and job["error"] is None and job["done"] == job["total"]
        made = http.get("/v1/contexts/manual").json()
        assert made["title"] == "The manual" and made["tokens"] == 601 and not made["pinned"]
        assert [c["id"] for c in http.get("/v1/contexts").json()["data"]] == ["manual"]
        first = texts(served, "manual")
        assert http.get("/v1/contexts/manual").json()["resident"]
        changed = http.patch("/v1/contexts/manual", json={"name": "book", "ttl": 1000})
        assert changed.json()["id"] == "book" and changed.json()["title"] == "The manual"
        assert changed.json()["expires"] == pytest.approx(time.time() + 1000, abs=10)
        assert ask(served, "manual").status_code == 404 and texts(served, "book") == first
        assert http.patch("/v1/contexts/book", json={"ttl": None}).json()["expires"] is None
        assert http.delete("/v1/contexts/book").json()["deleted"]
        assert ask(served, "book").status_code == 404
        assert http.get("/v1/contexts").json()["data"] == []
    assert [path.name for path in tmp_path.iterdir()] == [PLACE]
    assert list((tmp_path / PLACE / "contexts").iterdir()) == []


def test_made_context_answers_as_one_that_index_saved(tmp_path, saved):
    with serving(saved) as served:
        expected = texts(served, "one")
    with serving(tmp_path) as served:
        served.make("mine", document(600))
        assert texts(served, "mine") == expected


def test_contexts_are_found_again_with_their_notes_after_a_restart(tmp_path):
    with serving(tmp_path) as served:
        served.make("manual", document(600), pinned=True, ttl=500)
        before = texts(served, "manual")
    with serving(tmp_path) as served, served.http() as http:
        found = http.get("/v1/contexts/manual").json()
        assert found["pinned"] and found["ttl"] == 500 and found["expires"] is None
        assert texts(served, "manual") == before
        assert [job["state"] for job in http.get("/v1/jobs").json()["data"]] == ["done"]


def test_context_that_comes_from_elsewhere_is_found_and_one_of_another_model_is_not(
    tmp_path, saved
):
    with serving(tmp_path) as served, served.http() as http:
        for name in ("one", "strange"):
            shutil.copytree(saved / f"{name}.sqz", tmp_path / f"{name}.sqz")
        assert served.until(lambda: http.get("/v1/contexts").json()["data"])
        found = http.get("/v1/contexts").json()
        assert [c["id"] for c in found["data"]] == ["one"]
        assert found["refused"] == [{"id": "strange", "why": "it was made with another model"}]
        assert ask(served, "strange").status_code == 409
        assert ask(served, "one").status_code == 200


def test_context_without_a_use_for_its_lifetime_is_removed_and_a_pinned_one_is_not(tmp_path):
    with serving(tmp_path) as served, served.http() as http:
        served.make("short", document(300), ttl=1)
        served.make("kept", document(300), ttl=1, pinned=True)
        gone = served.until(lambda: http.get("/v1/contexts/short").status_code == 404)
        assert gone and not (tmp_path / "short.sqz").exists()
        assert http.get("/v1/contexts/kept").status_code == 200


def test_least_recently_used_context_leaves_the_memory_and_a_pinned_one_stays(tmp_path):
    with serving(tmp_path) as served, served.http() as http:
        for number, name in enumerate(("a", "b", "c")):
            served.make(name, document(600, number))
        size = http.get("/v1/contexts/a").json()["bytes"]
        served.engine.residents.capacity = int(2.5 * size)
        answers = {name: texts(served, name) for name in ("a", "b", "c")}
        assert served.engine.resident() == {"b", "c"}
        assert texts(served, "b") == answers["b"] and texts(served, "a") == answers["a"]
        assert served.engine.resident() == {"a", "b"}
        http.patch("/v1/contexts/a", json={"pinned": True})
        texts(served, "b")
        assert texts(served, "c") == answers["c"]
        assert served.engine.resident() == {"a", "c"}
        numbers = served.engine.numbers()
        assert numbers["resident_bytes"] == 2 * size and numbers["context_evictions"] == 3
        served.engine.residents.capacity = size - 1
        refused = ask(served, "b")
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "no_memory"


BAD_NAMES = ["../out", "a/b", ".hidden", "", "a" * 101, "none", "a\x00b", "ä", "a b", ".server"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_cannot_leave_the_directory(name, tmp_path):
    with serving(tmp_path / "inside") as served, served.http() as http:
        found = http.post("/v1/contexts", json={"name": name, "text": "some words"})
        assert found.status_code == 400 and "name" in found.json()["error"]["message"]
        form = {"file": ("../../etc/passwd.txt", b"words and words")}
        made = http.post("/v1/contexts", files=form)
        assert made.json()["context"] == "passwd" and made.json()["file"] == "passwd.txt"
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]


def test_name_that_is_taken_or_being_made_is_refused(tmp_path):
    with serving(tmp_path) as served, served.http() as http:
        served.make("manual", document(300))
        again = http.post("/v1/contexts", json={"name": "manual", "text": "words"})
        assert again.status_code == 409 and again.json()["error"]["code"] == "name_taken"
        job = http.post("/v1/contexts", json={"name": "new", "text": document(3000)}).json()
        second = http.post("/v1/contexts", json={"name": "new", "text": "words"})
        assert second.status_code == 409
        assert served.wait(job["id"])["state"] == "done"
        assert http.patch("/v1/contexts/new", json={"name": "manual"}).status_code == 409
        assert {c["id"] for c in http.get("/v1/contexts").json()["data"]} == {"manual", "new"}


def events_of(http, job):
    found = []
    with http.stream("GET", f"/v1/jobs/{job}/events") as stream:
        for line in stream.iter_lines():
            if line.startswith("event: "):
                found.append([line[7:], None])
            elif line.startswith("data: "):
                found[-1][1] = json.loads(line[6:])
    return found


def test_progress_of_a_job_is_streamed_to_its_end(tmp_path):
    with serving(tmp_path) as served, served.http() as http:
        text = document(3500)
        job = http.post("/v1/contexts", json={"name": "manual", "text": text}).json()
        found = events_of(http, job["id"])
        names = [name for name, _ in found]
        assert names[-1] == "done" and set(names[:-1]) == {"progress"}
        read = [e["done"] for _, e in found if e["phase"] == "prefill"]
        assert read == sorted(read) and all(e["total"] for n, e in found if e["phase"])
        assert found[-1][1]["state"] == "done"
        assert events_of(http, job["id"]) == [found[-1]]


def test_job_can_be_cancelled_and_leaves_nothing(tmp_path, monkeypatch):
    begun, go = threading.Event(), threading.Event()
    with serving(tmp_path) as served, served.http() as http:
        real = served.engine.session.index

        def slow(text, name, config, template, progress):
            progress("prefill", 1, 2)
            begun.set()
            go.wait(60)
            progress("prefill", 2, 2)
            return real(text, name, config, template, progress)

        monkeypatch.setattr(served.engine.session, "index", slow)
        job = http.post("/v1/contexts", json={"name": "manual", "text": document(600)}).json()
        waiting = http.post("/v1/contexts", json={"name": "other", "text": document(600)}).json()
        begun.wait(60)
        assert http.delete(f"/v1/jobs/{waiting['id']}").json()["state"] == "cancelled"
        assert http.delete(f"/v1/jobs/{job['id']}").json()["state"] == "cancelled"
        go.set()
        monkeypatch.undo()
        assert served.make("next", document(300))["state"] == "done"
        assert [c["id"] for c in http.get("/v1/contexts").json()["data"]] == ["next"]
    assert not (tmp_path / "manual.sqz").exists()


def test_job_under_way_when_the_server_ends_is_begun_anew_by_the_next(tmp_path, monkeypatch):
    served = start(tmp_path)
    begun = threading.Event()

    def slow(text, name, config, template, progress):
        begun.set()
        while True:
            progress("prefill", 1, 2)
            time.sleep(0.01)

    monkeypatch.setattr(served.engine.session, "index", slow)
    with served.http() as http:
        sent = {"name": "manual", "text": document(600), "title": "T"}
        job = http.post("/v1/contexts", json=sent).json()
    begun.wait(60)
    served.stop()
    assert not (tmp_path / "manual.sqz").exists()
    monkeypatch.undo()
    with serving(tmp_path) as served, served.http() as http:
        assert served.wait(job["id"])["state"] == "done"
        assert http.get("/v1/contexts/manual").json()["title"] == "T"
        assert ask(served, "manual").status_code == 200


def test_job_that_ended_the_server_again_and_again_is_not_begun_again(tmp_path):
    with serving(tmp_path) as served:
        served.make("manual", document(300))
    [file] = (tmp_path / PLACE / "jobs").glob("*/job.json")
    job = json.loads(file.read_text())
    file.write_text(json.dumps(job | {"state": "running", "begun": 3}))
    half = tmp_path / PLACE / "jobs" / "job-half"
    half.mkdir()
    with serving(tmp_path) as served, served.http() as http:
        found = http.get(f"/v1/jobs/{job['id']}").json()
        assert found["state"] == "failed" and "ended 3 times" in found["error"]
    assert not half.exists()


def test_full_disk_is_one_clear_error_and_the_server_goes_on(tmp_path, monkeypatch):
    def full(descriptor, tensors, metadata=None):
        raise OSError(28, "No space left on device")

    with serving(tmp_path) as served, served.http() as http:
        monkeypatch.setattr("squeezed.context.storage.tensorfile.write", full)
        job = served.make("manual", document(300))
        assert job["state"] == "failed" and "No space left on device" in job["error"]
        assert "free space" in job["error"] and str(tmp_path) not in job["error"]
        monkeypatch.undo()
        assert http.get("/v1/contexts").json()["data"] == []
        assert served.make("manual", document(300))["state"] == "done"


def test_too_many_documents_and_too_long_ones_are_refused(tmp_path, monkeypatch):
    with serving(tmp_path, jobs=1, max_document_tokens=500) as served, served.http() as http:
        gate = threading.Event()
        real = served.engine._index
        monkeypatch.setattr(served.engine, "_index", lambda *a: (gate.wait(60), real(*a)))
        first = http.post("/v1/contexts", json={"name": "a", "text": document(600)}).json()
        busy = http.post("/v1/contexts", json={"name": "b", "text": "words"})
        assert busy.status_code == 429 and int(busy.headers["Retry-After"]) > 0
        gate.set()
        job = served.wait(first["id"])
        assert job["state"] == "failed" and "at most 500 are taken" in job["error"]


def docx_bytes():
    made, out = docx.Document(), io.BytesIO()
    made.add_heading("The manual")
    made.add_paragraph("Press the red button.")
    table = made.add_table(1, 2)
    table.rows[0].cells[0].text, table.rows[0].cells[1].text = "part", "price"
    made.save(out)
    return out.getvalue()


def pdf_bytes(text="Press the red button."):
    """The smallest PDF that shows a line."""
    stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    head = b"xref\n0 6\n0000000000 65535 f \n" + table
    return out + head + b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % len(out)


HTML = (
    "<html><head><title>Manual</title><script>alert('x')</script><style>p {}</style></head>"
    "<body><p>Press the <b>red</b> button.</p><p>Then wait &amp; see.</p></body></html>"
)

FILES = {
    "a.txt": (b"Press the red button.", "Press the red button."),
    "a.md": ("# Manual\n\nPress é.".encode(), "# Manual\n\nPress é."),
    "a.html": (HTML.encode(), "Manual\n\nPress the red button.\n\nThen wait & see."),
    "a.docx": (docx_bytes(), "The manual\n\nPress the red button.\n\npart | price"),
    "a.pdf": (pdf_bytes(), "Press the red button."),
}


def upload(tmp_path, name, data, limits=Limits(30)):  # noqa: B008
    path = tmp_path / "upload"
    path.write_bytes(data)
    return text_of_upload(name, path, limits)


@pytest.mark.parametrize("name", FILES)
def test_files_become_their_text(name, tmp_path):
    data, expected = FILES[name]
    assert upload(tmp_path, name, data).strip() == expected


def zip_bomb():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", b"<a>" * (100 << 20))
    return out.getvalue()


def lying_zip_bomb():
    """Says of itself that it is small."""
    data = bytearray(zip_bomb())
    central = data.rindex(b"PK\x01\x02")
    data[central + 24 : central + 28] = (1000).to_bytes(4, "little")
    data[22:26] = (1000).to_bytes(4, "little")
    return bytes(data)


BAD_FILES = {
    "zip bomb": ("a.docx", zip_bomb, "takes too much to read"),
    "zip bomb that lies": ("a.docx", lying_zip_bomb, "cannot be read|takes too much"),
    "no zip": ("a.docx", lambda: b"words", "is no DOCX file"),
    "cut pdf": ("a.pdf", lambda: pdf_bytes()[:60], "cannot be read"),
    "pdf without text": ("a.pdf", lambda: pdf_bytes(""), "holds no text"),
    "binary": ("a.txt", lambda: b"\x00\xff\xfe" * 50, "not UTF-8|convert it"),
    "picture": ("a.html", lambda: b"\x89PNG\r\n\x1a\n\x00\xff", "PNG"),
    "empty": ("a.txt", lambda: b"  \n ", "holds no text"),
    "empty page": ("a.html", lambda: b"<script>x</script>", "holds no text"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_one_line(kind, tmp_path):
    name, made, said = BAD_FILES[kind]
    with pytest.raises(squeezed.SqueezedError, match=said) as refused:
        upload(tmp_path, name, made(), Limits(30, 512))
    assert "\n" not in str(refused.value)


def test_reader_of_a_file_is_ended_in_time_and_by_its_limits(tmp_path):
    page = b"<p>" * (1 << 22)
    started = time.monotonic()
    with pytest.raises(squeezed.SqueezedError, match="could not be read in 1 s"):
        upload(tmp_path, "a.html", page, Limits(1))
    assert time.monotonic() - started < 10
    with pytest.raises(squeezed.SqueezedError, match="more text than is allowed"):
        upload(tmp_path, "a.html", b"words " * 1000, Limits(30, 512, 1000))


def test_uploaded_file_becomes_a_context_with_its_source(tmp_path):
    with serving(tmp_path) as served, served.http() as http:
        form = {"file": ("The Manual.html", HTML.encode() * 20)}
        more = {"title": "M", "pinned": "true", "ttl": "60"}
        job = http.post("/v1/contexts", files=form, data=more).json()
        assert job["context"] == "The-Manual" and served.wait(job["id"])["state"] == "done"
        made = http.get("/v1/contexts/The-Manual").json()
        assert made["source"] == "The Manual.html" and made["pinned"] and made["title"] == "M"
        cut = http.get("/v1/contexts/The-Manual/passages").json()
        assert "Press the red button." in cut["text"] and "alert" not in cut["text"]
        refused = http.post("/v1/contexts", files=form, data={"budget": "1"})
        assert refused.json()["error"]["code"] == "unsupported_field"
        assert http.post("/v1/contexts", data={"name": "x"}).status_code == 415
        assert http.post("/v1/contexts", content=b"words").status_code == 415
        failed = http.post("/v1/contexts", files={"file": ("x.pdf", pdf_bytes()[:60])}).json()
        assert "cannot be read" in served.wait(failed["id"])["error"]


def test_control_tokens_in_documents_are_text(tmp_path):
    with serving(tmp_path) as served, served.http() as http:
        served.make("sly", "</s><s>" + document(300))
        assert http.get("/v1/contexts/sly").json()["tokens"] == 1 + 7 + 300


def test_text_that_begins_like_a_file_of_another_kind_is_text(tmp_path):
    with serving(tmp_path) as served, served.http() as http:
        served.make("odd", "%PDF- is how PDF files begin. " + document(300))
        assert http.get("/v1/contexts/odd/passages").json()["text"].startswith("%PDF- is how")


def test_name_that_is_taken_while_a_document_waits_is_not_replaced(tmp_path, saved):
    with serving(tmp_path) as served, served.http() as http:
        gate, real = threading.Event(), served.server.jobs._text
        served.server.jobs._text = lambda *given: (gate.wait(60), real(*given))[1]
        job = http.post("/v1/contexts", json={"name": "one", "text": document(300)}).json()
        shutil.copytree(saved / "one.sqz", tmp_path / "one.sqz")
        gate.set()
        ended = served.wait(job["id"])
        assert ended["state"] == "failed" and "was taken meanwhile" in ended["error"]
        assert http.get("/v1/contexts/one").json()["tokens"] == 601
