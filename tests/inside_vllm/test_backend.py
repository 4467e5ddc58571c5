"""The backend for GPUs, with vLLM's kernel and our own computed by PyTorch: rows told apart, block
tables shifted, parts of prompts, what is joined and what is counted."""

import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from methods.contexts import random_context

from squeezed.attention.interface import Suffix
from squeezed.attention.reference import attend as reference
from squeezed.config import IndexConfig
from squeezed.context.prompt import PromptTemplate
from squeezed.context.record import ContextRecord
from squeezed.vllm import backend as ours
from squeezed.vllm import builder as builders
from squeezed.vllm import gpu_worker
from squeezed.vllm.arena import HeldContext
from squeezed.vllm.blocks import ContextAttentionSpec
from squeezed.vllm.cutting import Share
from squeezed.vllm.graphs import WARM_RUNS
from squeezed.vllm.news import Reader, StepNews
from squeezed.vllm.plugin import GPU_WORKER
from squeezed.vllm.settings import Settings
from squeezed.vllm.worker import WORKER

CPU = torch.device("cpu")
BLOCK, BLOCKS, KV_HEADS, HEADS, DIM, LAYERS = 16, 60, 2, 4, 32, 2


def record(tokens, seed):
    made = random_context(LAYERS, tokens, seed)
    return ContextRecord(
        tokens=torch.arange(tokens),
        layers=tuple(made.clustered_layers),
        windows=(None,) * LAYERS,
        calibrations=made.calibrations,
        config=IndexConfig(),
        template=PromptTemplate.plain(),
        model={},
        tokenizer="",
        seconds={},
    )


def varlen(q, k, v, out, cu_seqlens_q, seqused_k, softmax_scale, block_table, **kwargs):
    """vLLM's kernel: causal attention of every row to its own blocks, and its log-sum-exp."""
    assert kwargs["causal"] and kwargs["return_softmax_lse"]
    lse = torch.full((q.shape[1], len(q)), float("nan"))
    for row, length in enumerate(seqused_k.tolist()):
        start, stop = cu_seqlens_q[row : row + 2].tolist()
        keys, values = (x[block_table[row].long()].flatten(0, 1)[:length] for x in (k, v))
        keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (keys, values))
        logits = softmax_scale * torch.einsum("qhd,khd->hqk", q[start:stop], keys)
        seen = torch.ones(stop - start, length, dtype=torch.bool).tril(length - (stop - start))
        logits = logits.masked_fill(~seen, float("-inf"))
        lse[:, start:stop] = logits.logsumexp(-1)
        out[start:stop] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), values)
    return out, lse


def builder():
    made = object.__new__(builders.SqueezedBuilder)
    made.block_size, made.device, made.fixed = BLOCK, CPU, {}
    shape = {"block_size": BLOCK, "num_kv_heads": KV_HEADS, "head_size": DIM}
    made.kv_cache_spec = ContextAttentionSpec(**shape, dtype=torch.float32)
    made.places, made.reads = (torch.zeros(16, dtype=torch.int64) for _ in "ab")
    return made


def metadata(self, common_prefix_len, common, fast_build=False):
    return builders.FlashAttentionMetadata(
        num_actual_tokens=common.num_actual_tokens,
        max_query_len=common.max_query_len,
        query_start_loc=common.query_start_loc,
        max_seq_len=common.max_seq_len,
        seq_lens=common.seq_lens,
        block_table=common.block_table_tensor,
        slot_mapping=common.slot_mapping,
    )


@pytest.fixture
def worker(monkeypatch):
    monkeypatch.setattr(ours.fa_utils, "flash_attn_varlen_func", varlen, raising=False)
    monkeypatch.setattr(builders.FlashAttentionMetadataBuilder, "build", metadata)
    WORKER.start(Share(), CPU, Settings(implementation="reference"))
    for key, tokens, seed in (("one", 300, 0), ("two", 411, 7)):
        whole = (tokens - 4) // BLOCK * BLOCK
        held = HeldContext(record(tokens, seed), tokens - whole, Share(), CPU, "reference")
        WORKER.arena.held[key] = held
    yield WORKER
    WORKER.__init__()


READERS = {
    "a": Reader("one", "one", 0.1, "best", 300, 320),
    "b": Reader("one", "one", 0.1, "best", 300, 310),
    "c": Reader("two", "two", 0.3, "paper", 411, 500),
    "d": Reader("two", "two", 0.1, "best", 411, 560),
    "e": Reader("one", "one", 0.1, "best", 300, 317),
    "f": Reader("two", "two", 0.1, "best", 411, 560),
}


class Manager:
    """vLLM's graph manager, which has full graphs of uniform batches, and runs a model as it is."""

    pool = None

    def dispatch(self, num_reqs, num_tokens, uniform_token_count, **kwargs):
        return "pieces" if uniform_token_count is None else "full"

    def run_pw_graph(self, model, model_inputs):
        return model(**model_inputs)


class Stage:
    """What is at one address in all steps under vLLM's graphs.

    With `steps`, a step is one graph.
    """

    def __init__(self, steps=None):
        self.builder, self.steps = builder(), steps
        self.query = torch.zeros(256, HEADS, DIM)
        self.cache = torch.zeros(BLOCKS, KV_HEADS, BLOCK, 2 * DIM)
        self.outputs = [torch.zeros(256, HEADS, DIM) for _ in range(LAYERS)]

    def tensors(self, batch):
        self.query[: len(batch.query)] = batch.query
        self.cache.copy_(batch.cache)
        for output in self.outputs:
            output.fill_(float("nan"))
        return self.query, self.cache, self.outputs

    def run(self, model, query, meta):
        if self.steps is None:
            return model(query)
        modes = gpu_worker.CUDAGraphMode
        context = SimpleNamespace(
            attn_metadata={"model.layers.0.attn": meta},
            slot_mapping={},
            cudagraph_runtime_mode=modes.PIECEWISE,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpu_worker, "get_forward_context", lambda: context)
            found = self.steps.run_pw_graph(model, {"query": query})
        assert context.cudagraph_runtime_mode == modes.PIECEWISE
        return found


class Batch:
    """Rows `(request, new tokens, tokens of the request)`, over random queries and blocks."""

    def __init__(self, *rows, seed=0):
        self.rows, generator = rows, torch.Generator().manual_seed(seed)
        self.query = torch.randn(sum(row[1] for row in rows), HEADS, DIM, generator=generator)
        sizes = BLOCKS, KV_HEADS, BLOCK, 2 * DIM
        self.cache = torch.randn(*sizes, generator=generator)
        self.table = torch.zeros(len(rows), 64, dtype=torch.int32)
        free = iter(range(1, BLOCKS))
        for place, (request, _, length) in enumerate(rows):
            held = self.held(request) // BLOCK
            for column in range(held, -(-length // BLOCK)):
                self.table[place, column] = next(free)

    def held(self, request):
        return WORKER.arena.held[READERS[request].key].tokens if request in READERS else 0

    def starts(self):
        return torch.tensor([0, *(row[1] for row in self.rows)]).cumsum(0).int()

    def answer(self, stage=None):
        """What the backend puts out, of both layers; `stage` has tensors that stay in place."""
        stage = stage or Stage()
        lengths = torch.tensor([row[2] for row in self.rows], dtype=torch.int32)
        common = ours_common(self.starts(), lengths, self.table)
        WORKER.step(StepNews(), [row[0] for row in self.rows], False)
        made = object.__new__(ours.SqueezedImpl)
        made.head_size, made.num_kv_heads, made.vllm_flash_attn_version = DIM, KV_HEADS, 3
        made.scale = WORKER.arena.held["one"].layers[0].scale
        meta = stage.builder.build(0, common)
        query, cache, outputs = stage.tensors(self)

        def model(query):
            for number, output in enumerate(outputs):
                scales = {"_k_scale": torch.ones(()), "_v_scale": torch.ones(())}
                layer = SimpleNamespace(layer_name=f"model.layers.{number}.attn", **scales)
                made.forward(layer, query, None, None, cache, meta, output)
            return outputs

        found = stage.run(model, query, meta)
        return [output[: len(self.query)].clone() for output in found], meta

    def wanted(self, number):
        """Row by row and token by token, by the reference."""
        outputs = []
        for place, (request, new, length) in enumerate(self.rows):
            held = self.held(request)
            own = self.cache[self.table[place, held // BLOCK :].long()].transpose(1, 2)
            keys, values = own.flatten(0, 1)[: length - held].split(DIM, -1)
            keys, values = (x.transpose(0, 1)[None] for x in (keys, values))
            start = int(self.starts()[place])
            asked = self.query[start : start + new].transpose(0, 1)[None]
            outputs.append(self.of_row(request, number, asked, keys, values, length))
        return torch.cat(outputs)

    def of_row(self, request, number, asked, keys, values, length):
        new = asked.shape[2]
        if request not in READERS:
            logits = torch.einsum("bhqd,bhkd->bhqk", asked, keys.repeat_interleave(2, 1))
            logits = logits * WORKER.arena.held["one"].layers[0].scale
            seen = torch.ones(new, length, dtype=torch.bool).tril(length - new)
            weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
            return (weights @ values.repeat_interleave(2, 1))[0].transpose(0, 1)
        reader = READERS[request]
        held = WORKER.arena.held[reader.key]
        layer = held.layers[number]
        recent = Suffix.of(layer, keys, values)
        ends = (reader.document_tokens, reader.prompt_tokens - held.single_tokens(reader.preset))
        parts, first = [], length - new
        cuts = sorted({0, new, *(min(new, max(0, end - first)) for end in ends)})
        for low, high in pairwise(cuts):
            kind = "whole" if first + low < ends[0] else "blocks" if first + low < ends[1] else ""
            rule = held.rule(reader.budget, reader.preset, number, kind)
            own = recent.of_rows(low, high, new)
            parts.append(reference(asked[:, :, low:high], layer, rule, own).output)
        return torch.cat(parts, 2)[0].transpose(0, 1)


def ours_common(starts, lengths, table):
    from vllm.v1.attention.backend import CommonAttentionMetadata

    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=len(lengths),
        num_actual_tokens=int(starts[-1]),
        max_query_len=int(starts.diff().max()),
        max_seq_len=int(lengths.max()),
        block_table_tensor=table,
        slot_mapping=torch.zeros(int(starts[-1]), dtype=torch.int64),
    )


def check(batch, stage=None):
    found, meta = batch.answer(stage)
    for number, output in enumerate(found):
        torch.testing.assert_close(output, batch.wanted(number), atol=2e-5, rtol=2e-5)
    return meta


BATCHES = {
    "decoding": [("a", 1, 330), ("b", 1, 312)],
    "two contexts": [("c", 1, 501), ("a", 1, 330), ("d", 1, 600), ("b", 1, 312)],
    "beside plain rows": [("x", 1, 40), ("a", 1, 330), ("y", 1, 3)],
    "a prompt": [("c", 500 - 400, 500)],
    "a prompt in chunks": [("d", 20, 420)],
    "prompts of one context": [("a", 32, 320), ("x", 5, 5), ("b", 22, 310), ("e", 29, 317)],
    "long prompts of one rule": [("d", 110, 510), ("e", 20, 308), ("f", 110, 510)],
    "all at once": [("a", 1, 330), ("d", 150, 550), ("x", 30, 30), ("b", 1, 312), ("c", 7, 407)],
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_is_answered_as_by_the_reference(worker, name):
    worker.readers.update(READERS)
    check(Batch(*BATCHES[name]))


def test_keys_relative_to_a_centre_are_joined_right(worker):
    worker.readers.update(READERS)
    for held in worker.arena.held.values():
        for layer in held.layers:
            layer.centre.copy_(torch.linspace(-2, 3, layer.centre.numel()).view_as(layer.centre))
    check(Batch(*BATCHES["all at once"]))


def test_batches_without_contexts_are_vllms_alone(worker, monkeypatch):
    seen = []
    monkeypatch.setattr(ours.FlashAttentionImpl, "forward", lambda *a, **k: seen.append(a))
    _, meta = Batch(("x", 1, 40), ("y", 3, 3)).answer()
    assert len(seen) == LAYERS and meta.step is None


def test_what_is_read_is_counted_once_a_step(worker):
    worker.readers.update(READERS)
    for request in READERS:
        worker.reports[request] = {}
    batch = Batch(*BATCHES["all at once"])
    batch.answer()
    spent = worker.spent()
    assert set(spent) == {"a", "b", "d"}, "c reads the document's own last tokens only"
    one = sum(x.clustered * KV_HEADS for x in worker.arena.held["one"].layers)
    two = sum(x.clustered * KV_HEADS for x in worker.arena.held["two"].layers)
    assert spent["a"][1] == one and spent["d"][1] == two * (550 - 411)
    assert all(0 < read < available for read, available in spent.values())
    assert worker.spent() == {}


def test_prompts_are_counted_together_as_alone(worker):
    worker.readers.update(READERS)
    rows = [("a", 32, 320), ("b", 22, 310), ("e", 29, 317)]
    alone = {}
    for row in (*rows, None):
        for request in READERS:
            worker.reports[request] = {}
            worker.meter.forget(request)
        batch = Batch(*rows, seed=3)
        if row is None:
            batch.answer()
            assert worker.spent() == alone
            continue
        own = Batch(row, seed=3)
        start = int(batch.starts()[rows.index(row)])
        own.query = batch.query[start : start + row[1]]
        own.answer()
        alone |= worker.spent()
    assert len(alone) == 3


def test_batches_that_only_decode_are_captured_and_read_what_is_new(worker):
    """Rows change places and lengths under one graph; another context needs another."""
    captured = []

    def capture(compute):
        captured.append(compute)
        return compute

    worker.readers.update(READERS)
    steps = gpu_worker.ContextSteps(Manager(), CPU, True)
    steps.graphs.capture, stage = capture, Stage(steps)
    for request in READERS:
        worker.reports[request] = {}
    spent = {}
    steps_done = WARM_RUNS + 4
    for seed in range(steps_done):
        rows = [("a", 1, 330 + seed), ("b", 1, 312 + seed), ("x", 1, 40)]
        check(Batch(*(rows if seed % 2 else rows[::-1]), seed=seed), stage)
        spent = worker.spent()
    assert len(captured) == 1
    one = sum(x.clustered * KV_HEADS for x in worker.arena.held["one"].layers)
    assert spent["a"][1] == spent["b"][1] == steps_done * one
    assert spent["a"][0] != spent["b"][0]
    for seed in range(WARM_RUNS + 2):
        check(Batch(("c", 1, 501), ("x", 1, 9), ("a", 1, 330), seed=seed), stage)
    assert len(captured) == 2
    assert check(Batch(*BATCHES["all at once"]), stage).step.alike is None
    assert len(captured) == 2


def test_a_step_that_makes_a_context_is_never_replayed(worker):
    worker.readers.update(READERS)
    steps = gpu_worker.ContextSteps(Manager(), CPU, True)
    stage = Stage(steps)
    worker.jobs["x"] = SimpleNamespace(see=lambda *args: None, complete=False, order=None)
    for seed in range(WARM_RUNS + 2):
        Batch(("a", 1, 330 + seed), ("b", 1, 312), seed=seed).answer(stage)
    assert not steps.graphs.runs


def test_full_graphs_of_vllm_are_for_steps_without_contexts(worker):
    steps = gpu_worker.ContextSteps(Manager(), CPU, True)
    asked = {"num_reqs": 2, "num_tokens": 2, "uniform_token_count": 1}
    worker.readers["a"] = READERS["a"]
    news = StepNews(readers={"b": READERS["b"]}, orders={"d": None})
    for requests, kind in ((["x"], "full"), (["x", "a"], "pieces"), (["b"], "pieces")):
        worker.foresee(news, requests)
        assert steps.dispatch(**asked) == kind
    for requests, kind in ((["d"], "pieces"), (["x"], "full")):
        worker.foresee(news, requests)
        assert steps.dispatch(**asked) == kind
    worker.jobs["y"] = None
    worker.foresee(None, ["y"])
    assert steps.dispatch(**asked) == "pieces"


@pytest.mark.parametrize(
    ("worker_cls", "second_runner", "support"),
    [
        (GPU_WORKER, True, "UNIFORM_SINGLE_TOKEN_DECODE"),
        (GPU_WORKER, False, "NEVER"),
        ("vllm.v1.worker.gpu_worker.Worker", True, "NEVER"),
    ],
)
def test_full_graphs_need_the_worker_that_tells_contexts_apart(worker_cls, second_runner, support):
    parallel = SimpleNamespace(worker_cls=worker_cls)
    config = SimpleNamespace(parallel_config=parallel, use_v2_model_runner=second_runner)
    assert builders.SqueezedBuilder.get_cudagraph_support(config, None).name == support


def test_buffers_of_graphs_stay_where_they_are():
    made = builder()
    batch = torch.arange(6, dtype=torch.int32)
    first = made._fixed("seq_lens", batch)
    second = made._fixed("seq_lens", batch + 1)
    assert first.data_ptr() == second.data_ptr()
    assert torch.equal(second, batch + 1)
    assert made.rounded(1) == made.rounded(builders.LEAST_LONGEST) == builders.LEAST_LONGEST
    assert made.rounded(513) == made.rounded(1024) == 1024 and made.rounded(1025) == 2048


def test_block_tables_begin_behind_the_context():
    table = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 0, 0, 0]])
    held = torch.tensor([2, 0], dtype=torch.int32)
    assert builders.shifted(table, held, 3).tolist() == [[5, 6, 7], [3, 4, 0]]
