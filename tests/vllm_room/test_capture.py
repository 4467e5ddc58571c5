import json
import time
from pathlib import Path

import pytest
import torch

import squeezed
from squeezed.context.prompt import PromptTemplate
from squeezed.errors import SqueezedError
from squeezed.vllm.capture import Job, checked_name, order_of
from squeezed.vllm.cutting import Share
from squeezed.vllm.news import StepNews
from squeezed.vllm.parts import Parts
from squeezed.vllm.rows import Row
from squeezed.vllm.settings import Settings
from squeezed.vllm.worker import Worker

HEADS, KV_HEADS, DIM, DOCUMENT, PROBE = 4, 2, 16, 400, 30
TEMPLATE = {"before": "", "between": "", "after": "", "keep_control_tokens": False}


ENGINE = {"model": {"weights": {}}, "ranks": 1, "layers": 2, "kv_heads": KV_HEADS, "dtype": "f"}


def said(**changes):
    usual = {
        "file": "x.sqz",
        "tokens": DOCUMENT + PROBE,
        "document_tokens": DOCUMENT,
        "template": TEMPLATE,
        "tokenizer": "t",
        "finish": True,
        "began": 1.0,
    }
    return json.dumps(usual | changes)


def order(place=Path("place"), engine=ENGINE, **changes):
    return order_of(said(**changes), range(DOCUMENT + PROBE), place, engine)


def test_an_order_says_what_is_read_and_where_it_goes():
    found = order()
    assert found.path == Path("place/x.sqz") and found.document_tokens == DOCUMENT
    assert found.name == "x" and found.kv_heads == KV_HEADS and found.finish
    assert not found.is_piece
    piece = order_of(said(), range(DOCUMENT), Path("place"), ENGINE)
    assert piece.is_piece and piece.tokens == found.tokens


def test_orders_are_alike_if_the_same_is_captured():
    """Wherever it lies, and whoever finishes it."""
    assert order().key == order(Path("elsewhere"), finish=False, began=2.0).key
    others = [
        order(file="y.sqz"),
        order(tokenizer="u"),
        order(document_tokens=DOCUMENT - 1),
        order(engine=ENGINE | {"ranks": 2}),
        order(engine=ENGINE | {"dtype": "g"}),
        order(engine=ENGINE | {"model": {}}),
    ]
    assert len({found.key for found in (order(), *others)}) == 1 + len(others)


@pytest.mark.parametrize("file", ["../x", "a/b", "", ".x", 5, None, "a\0"])
def test_files_that_lead_elsewhere_are_refused(file):
    with pytest.raises(SqueezedError, match="file"):
        order(file=file)


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".x", "x" * 200, 5, None, "a\n", "-x"])
def test_names_that_lead_elsewhere_are_refused(name):
    with pytest.raises(SqueezedError, match="name"):
        checked_name(name)


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        "{}",
        said(template={"before": ""}),
        said(document_tokens=0),
        said(document_tokens=DOCUMENT + PROBE),
        said(document_tokens="many"),
        said(tokens=DOCUMENT + PROBE - 1),
        said(tokens=None),
        said(began="today"),
        7,
    ],
)
def test_orders_that_make_no_sense_are_refused(text):
    with pytest.raises(SqueezedError):
        order_of(text, range(DOCUMENT + PROBE), Path("place"), ENGINE)


def test_without_a_directory_nothing_is_indexed():
    with pytest.raises(SqueezedError, match="no directory"):
        order(place=None)


def fed(job, cuts, keys, values, queries, layers=2, other=3, first=0):
    """Give a job its prompt in chunks, each behind `other` tokens of another request."""
    for stop in cuts:
        row = Row(1, other, other + stop - first, stop, "r")
        for layer in range(layers):
            batch = torch.zeros(other + stop - first, HEADS, DIM)
            batch[other:] = queries[layer][first:stop]
            job.see(row, layer, batch, 0.25, lambda layer=layer: (keys[layer], values[layer]))
        first = stop


def drawn(seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 2, KV_HEADS, DOCUMENT, DIM, generator=generator)
    return keys, values, torch.randn(2, DOCUMENT + PROBE, HEADS, DIM, generator=generator)


@pytest.mark.parametrize("cuts", [[430], [399, 400, 430], [64, 128, 410, 429, 430]])
def test_the_probes_queries_are_kept_however_the_prompt_is_cut(cuts):
    keys, values, queries = drawn()
    job = Job(order(), 2)
    fed(job, cuts, keys, values, queries)
    assert job.complete
    for layer in range(2):
        captured = job.layers[layer]
        assert torch.equal(captured.queries, queries[layer][DOCUMENT:].transpose(0, 1))
        assert torch.equal(captured.keys, keys[layer])


@pytest.mark.parametrize("first", [0, 384, 416])
def test_a_preempted_request_is_read_again_from_anywhere(first):
    """Blocks that are found in the prefix cache are not computed again; the probe's others are."""
    keys, values, queries = drawn()
    job = Job(order(), 2)
    fed(job, [64, 420], keys, values, queries)
    assert not job.complete
    fed(job, [425, 430], keys, values, queries, first=first)
    assert torch.equal(job.layers[1].queries, queries[1][DOCUMENT:].transpose(0, 1))


def test_pieces_of_the_probe_add_up(tmp_path):
    """Requests one after the other, each of which finds the blocks of those before."""
    keys, values, queries = drawn()
    here = Worker()
    here.start(Share(), torch.device("cpu"), Settings(implementation="reference"), layers=2)
    first, jobs = 0, set()
    for stop in (416, 425, DOCUMENT + PROBE):
        piece = order_of(said(), range(stop), tmp_path, ENGINE)
        request = f"request of {stop}"
        here.step(StepNews(orders={request: piece}), [], False)
        fed(here.jobs[request], [stop], keys, values, queries, first=first)
        jobs.add(id(here.jobs[request]))
        job, first = here.jobs[request], stop // 32 * 32
        if stop < DOCUMENT + PROBE:
            here.step(StepNews(finished=[request]), [], False)
    assert len(jobs) == 1 and job.complete
    assert torch.equal(job.layers[1].queries, queries[1][DOCUMENT:].transpose(0, 1))
    another = order_of(said(began=2.0), range(416), tmp_path, ENGINE)
    here.step(StepNews(orders={"r": another}), [], False)
    assert here.jobs["r"] is not job, "another attempt"


def test_a_probe_that_was_not_computed_is_no_context(tmp_path):
    keys, values, queries = drawn()
    job = Job(order(tmp_path), 2)
    fed(job, [430], keys, values, queries, first=416)
    assert not job.complete and "probe" in job.state["why"]


def test_what_fails_while_a_step_runs_stops_no_step(tmp_path):
    def no_memory():
        raise torch.OutOfMemoryError("out of memory")

    queries = drawn()[2]
    job = Job(order(tmp_path), 2)
    row = Row(0, 0, 430, 430, "r")
    for layer in range(2):
        job.see(row, layer, queries[layer], 0.25, no_memory)
    assert job.state["state"] == "failed" and job.state["why"].startswith("memory:")
    assert not job.complete and not job.layers
    assert "memory" in Parts.of(job.order).failure(1), "other ranks do not wait"


def ended(job, seconds=120):
    end = time.monotonic() + seconds
    while job.goes_on:
        assert time.monotonic() < end
        time.sleep(0.02)
    return job.state


def test_what_was_captured_becomes_a_saved_context(tmp_path):
    keys, values, queries = drawn()
    job = Job(order(tmp_path), 2)
    fed(job, [430], keys, values, queries)
    job.start()
    assert ended(job) == {"state": "saved", "tokens": DOCUMENT, "seconds": job.state["seconds"]}
    assert [path.name for path in tmp_path.iterdir()] == ["x.sqz"]
    context = squeezed.load(tmp_path / "x.sqz")
    assert context.tokens.tolist() == list(range(DOCUMENT))
    assert context.template == PromptTemplate.plain() and context.tokenizer == "t"
    assert len(context.layers) == 2 and len(context.observed) == 2
    assert set(context.calibrations) == {"paper", "best"}
    layer = context.layers[0]
    rows = layer.positions.long()[..., None].expand_as(layer.keys)
    torch.testing.assert_close(keys[0].gather(1, rows), layer.keys + layer.centre[:, None])


def test_what_cannot_be_saved_is_said_and_need_not_be_read_again(tmp_path):
    """Here another file has the name: when that is gone, the rest is done from what was kept."""
    keys, values, queries = drawn()
    (tmp_path / "x.sqz").write_text("something else")
    job = Job(order(tmp_path), 2)
    fed(job, [430], keys, values, queries)
    job.start()
    assert "not a saved context" in ended(job)["why"]
    (tmp_path / "x.sqz").unlink()
    assert Parts.of(job.order).is_complete(1)
    again = Job(order(tmp_path), 2)
    again.start()
    assert ended(again)["state"] == "saved"
    assert not Parts.of(job.order).path.exists()


def test_nan_is_said(tmp_path):
    keys, values, queries = drawn()
    keys[1, 0, 3, 2] = float("nan")
    job = Job(order(tmp_path), 2)
    fed(job, [430], keys, values, queries)
    job.start()
    assert "NaN" in ended(job)["why"]
    assert not (tmp_path / "x.sqz").exists()


def test_an_engine_that_only_captures_leaves_the_rest(tmp_path):
    keys, values, queries = drawn()
    job = Job(order(tmp_path, finish=False), 2)
    fed(job, [430], keys, values, queries)
    job.start()
    assert ended(job) == {"state": "captured"}
    assert Parts.of(job.order).is_complete(1) and not (tmp_path / "x.sqz").exists()
