import time

import pytest
import torch
from saved import made, put

import squeezed
from squeezed.vllm.arena import KEPT_RULES, Arena, HeldContext
from squeezed.vllm.catalogue import version_of
from squeezed.vllm.cutting import Share
from squeezed.vllm.news import Origin, Reader, StepNews
from squeezed.vllm.settings import Settings
from squeezed.vllm.worker import KEPT_REPORTS, Worker

CPU = torch.device("cpu")


def origin(path, dropped=5):
    return Origin(path, version_of(path), dropped)


def until_loaded(arena, count=1, seconds=60):
    """What `count` loads came to."""
    end, loaded, failed = time.monotonic() + seconds, [], {}
    while len(loaded) + len(failed) < count:
        assert time.monotonic() < end, "nothing came"
        some, others = arena.arrived(0.05)
        loaded, failed = loaded + some, failed | others
    return loaded, failed


def test_a_context_is_loaded_cut_and_evicted():
    path, ids = made()
    arena = Arena(Share(0, 2), CPU)
    arena.load([("k", origin(path))])
    assert until_loaded(arena) == (["k"], {})
    held = arena.held["k"]
    assert held.tokens == len(ids) - 5
    assert held.layers[0].keys.shape[0] == 1
    assert arena.seconds["k"] > 0
    arena.evict(["k", "unknown"])
    assert not arena.held
    arena.end()


def test_what_cannot_be_loaded_is_said(tmp_path):
    put(tmp_path, "one")
    path = tmp_path / "one.sqz"
    wrong = Origin(path, "another", 5)
    file = path / "layer_001.safetensors"
    arena = Arena(Share(), CPU)
    arena.load([("replaced", wrong), ("gone", Origin(tmp_path / "gone", "", 5))])
    failed = until_loaded(arena, 2)[1]
    assert "replaced" in failed["replaced"]
    assert "no saved context there" in failed["gone"]
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    arena.load([("altered", origin(path))])
    assert "checksum" in until_loaded(arena)[1]["altered"]
    arena.end()


def test_a_context_that_is_not_wanted_any_more_is_not_kept():
    arena = Arena(Share(), CPU)
    arena.load([("k", origin(made()[0]))])
    arena.evict(["k"])
    arena.load([("later", origin(made()[0]))])
    assert until_loaded(arena) == (["later"], {}), "loads come in the order of their orders"
    assert set(arena.held) == {"later"}
    arena.end()


@pytest.mark.parametrize("rank", [0, 1])
def test_rules_are_those_of_the_rank(rank):
    context = squeezed.load(made()[0])
    held = HeldContext(context, 0, Share(rank, 2), CPU, "reference")
    for number, attention in enumerate(held.at(0.1, "best")):
        rule = context.calibration("best").rule(number, 0.1, block=False)
        assert torch.equal(attention.token.log_thresholds, rule.log_thresholds[:, rank : rank + 1])
        assert torch.equal(attention.token.far_alpha, rule.far_alpha[2 * rank : 2 * rank + 2])
        assert attention.layer is held.layers[number]


def test_rules_are_made_once_and_not_kept_for_ever():
    held = HeldContext(squeezed.load(made()[0]), 0, Share(), CPU, "reference")
    first = held.at(0.1, "best")
    assert held.at(0.1, "best") is first
    for number in range(KEPT_RULES):
        held.at((number + 1) / 100 + 0.2, "paper")
    assert held.at(0.1, "best") is not first


def worker():
    here = Worker()
    here.start(Share(), CPU, Settings(implementation="reference"))
    return here


def test_a_worker_counts_what_requests_read_and_tells_after_their_end():
    here = worker()
    reader = Reader("k", "one", 0.1, "best", 40, 50)
    here.step(StepNews(readers={"chat-1-x": reader}, fallbacks={"chat-2": "no"}), [], False)
    here.meter.count(["chat-1-x"], torch.tensor([3]), 10)
    here.meter.count(["chat-1-x"], torch.tensor([4]), 10)
    assert here.spent() == {"chat-1-x": (7, 20)}
    assert here.spent() == {}, "only what changed"
    here.meter.count(["chat-1-x"], torch.tensor([1]), 10)
    assert here.spent() == {"chat-1-x": (8, 30)}
    here.step(StepNews(finished=["chat-1-x"]), [], False)
    assert here.spent() == {}
    assert "chat-1-x" not in here.readers
    assert here.report("chat-1") == {
        "context": "one",
        "preset": "best",
        "budget": 0.1,
        "budget_spent": 8 / 30,
        "keys_read": 8,
    }
    assert here.report("chat-2") == {"context": None, "fallback": "no"}
    assert here.report("cha") is None


def test_reports_are_not_kept_for_ever():
    here = worker()
    for number in range(KEPT_REPORTS + 5):
        here.step(StepNews(fallbacks={f"r{number}": "no"}), [], False)
    assert here.report("r4") is None
    assert here.report(f"r{KEPT_REPORTS + 4}")
