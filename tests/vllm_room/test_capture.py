import json
import time
from pathlib import Path

import pytest
import torch
from saved import made

import squeezed
from squeezed.context.prompt import PromptTemplate
from squeezed.errors import SqueezedError
from squeezed.vllm.capture import Job, checked_name, order_of
from squeezed.vllm.rows import Row

HEADS, KV_HEADS, DIM, DOCUMENT, PROBE = 4, 2, 16, 400, 30
TEMPLATE = {"before": "", "between": "", "after": "", "keep_control_tokens": False}


def said(**changes):
    usual = {"name": "x", "document_tokens": DOCUMENT, "template": TEMPLATE, "tokenizer": "t"}
    return json.dumps(usual | changes)


def order(place=Path("place"), **changes):
    return order_of(said(**changes), range(DOCUMENT + PROBE), place, {"weights": {}})


def test_an_order_says_what_is_read_and_where_it_goes():
    found = order()
    assert found.path == Path("place/x.sqz") and found.document_tokens == DOCUMENT
    assert order(name="x.sqz").path == Path("place/x.sqz")


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
        7,
    ],
)
def test_orders_that_make_no_sense_are_refused(text):
    with pytest.raises(SqueezedError):
        order_of(text, range(DOCUMENT + PROBE), Path("place"), {})


def test_without_a_directory_nothing_is_indexed():
    with pytest.raises(SqueezedError, match="no directory"):
        order(place=None)


def fed(job, cuts, keys, values, queries, layers=2, other=3):
    """Give a job its prompt in chunks, each behind `other` tokens of another request."""
    first = 0
    for stop in cuts:
        row = Row(1, other, other + stop - first, stop, "r")
        for layer in range(layers):
            batch = torch.zeros(other + stop - first, HEADS, DIM)
            batch[other:] = queries[layer][first:stop]
            job.see(row, layer, batch, 0.25, lambda layer=layer: (keys[layer], values[layer]))
        first = stop


def drawn():
    generator = torch.Generator().manual_seed(0)
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


def test_a_preempted_request_begins_anew():
    keys, values, queries = drawn()
    job = Job(order(), 2)
    fed(job, [64, 410], keys, values, queries + 1)
    assert not job.complete
    fed(job, [200, 430], keys, values, queries)
    assert torch.equal(job.layers[1].queries, queries[1][DOCUMENT:].transpose(0, 1))


def ended(job, seconds=60):
    end = time.monotonic() + seconds
    while job.state["state"] not in ("saved", "failed"):
        assert time.monotonic() < end
        time.sleep(0.02)
    return job.state


def test_what_was_captured_becomes_a_saved_context(tmp_path):
    keys, values, queries = drawn()
    job = Job(order(tmp_path), 2)
    fed(job, [430], keys, values, queries)
    job.start()
    assert ended(job)["state"] == "saved"
    context = squeezed.load(tmp_path / "x.sqz")
    assert context.tokens.tolist() == list(range(DOCUMENT))
    assert context.template == PromptTemplate.plain() and context.tokenizer == "t"
    assert len(context.layers) == 2 and len(context.observed) == 2
    assert set(context.calibrations) == {"paper", "best"}
    layer = context.layers[0]
    rows = layer.positions.long()[..., None].expand_as(layer.keys)
    torch.testing.assert_close(keys[0].gather(1, rows), layer.keys + layer.centre[:, None])


def test_what_cannot_be_saved_is_said(tmp_path):
    keys, values, queries = drawn()
    keys[1, 0, 3, 2] = float("nan")
    job = Job(order(tmp_path), 2)
    fed(job, [430], keys, values, queries)
    job.start()
    assert ended(job)["state"] == "failed" and "NaN" in job.state["why"]
    assert not list(tmp_path.iterdir())
    (tmp_path / "x.sqz").write_text("something else")
    keys[1, 0, 3, 2] = 0.0
    job = Job(order(tmp_path), 2)
    fed(job, [430], keys, values, queries)
    job.start()
    assert "not a saved context" in ended(job)["why"]
    assert made()
