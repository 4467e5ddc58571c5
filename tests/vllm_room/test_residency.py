import random

import pytest

from squeezed.errors import SqueezedError
from squeezed.vllm.residency import FAILED, LOADING, Residency


def ready(residency, key, size, reader):
    residency.read(key, key, size, reader)
    residency.loaded(key)
    assert residency.read(key, key, size, reader)


def test_a_reader_begins_when_its_context_is_there():
    plan = Residency(10)
    assert not plan.read("a", "place of a", 4, "r1")
    assert plan.take_orders().load == {"a": "place of a"}
    assert not plan.read("a", "place of a", 4, "r2")
    assert not plan.take_orders().load, "one load serves all"
    plan.loaded("a")
    assert plan.read("a", "place of a", 4, "r1")
    assert plan.read("a", "place of a", 4, "r2")


def test_the_least_recently_used_goes():
    plan = Residency(10)
    for key in "abc":
        ready(plan, key, 3, f"of {key}")
        plan.ended(key, f"of {key}")
    ready(plan, "a", 3, "again")
    plan.ended("a", "again")
    plan.take_orders()
    plan.read("d", "d", 4, "of d")
    assert plan.take_orders().evict == ["b"]


def test_what_is_read_stays_and_others_go():
    plan = Residency(10)
    ready(plan, "a", 5, "reader of a")
    ready(plan, "b", 5, "reader of b")
    plan.ended("b", "reader of b")
    plan.take_orders()
    plan.read("c", "c", 5, "reader of c")
    assert plan.take_orders().evict == ["b"], "a is older and read"


def test_nothing_goes_while_it_is_read_or_loading():
    plan = Residency(10)
    ready(plan, "a", 5, "r")
    plan.read("b", "b", 5, "s")
    plan.take_orders()
    assert not plan.read("c", "c", 5, "t")
    orders = plan.take_orders()
    assert not orders.evict and not orders.load
    assert plan.held["b"].state == LOADING


def test_who_waits_is_served_before_new_readers():
    plan = Residency(10)
    ready(plan, "a", 10, "first")
    assert not plan.read("b", "b", 10, "waits")
    assert not plan.read("a", "a", 10, "late"), "a must go for b"
    assert plan.read("a", "a", 10, "first"), "who reads goes on"
    plan.ended("a", "first")
    assert not plan.read("b", "b", 10, "waits")
    orders = plan.take_orders()
    assert orders.evict[-1:] == ["a"] and "b" in orders.load
    plan.loaded("b")
    assert plan.read("b", "b", 10, "waits")


def test_who_gives_up_waiting_is_in_nobodys_way():
    plan = Residency(10)
    ready(plan, "a", 10, "first")
    assert not plan.read("b", "b", 10, "waits")
    plan.ended("b", "waits")
    assert plan.read("a", "a", 10, "late")


def test_a_context_larger_than_all_is_refused():
    with pytest.raises(SqueezedError, match="context_memory"):
        Residency(10).read("a", "a", 11, "r")


def test_a_failed_load_is_said_and_may_be_tried_again():
    plan = Residency(10)
    plan.read("a", "a", 5, "r")
    plan.failed("a", "the disk is gone")
    with pytest.raises(SqueezedError, match="the disk is gone"):
        plan.read("a", "a", 5, "r")
    assert plan.held["a"].state == FAILED
    assert plan.used == 0
    plan.take_orders()
    plan.forget_failures()
    assert not plan.read("a", "a", 5, "r")
    assert plan.take_orders().load == {"a": "a"}


def test_what_was_deleted_goes_when_nobody_reads_it():
    plan = Residency(10)
    ready(plan, "a", 5, "r")
    plan.take_orders()
    plan.drop_unread(keep=set())
    assert not plan.take_orders().evict
    plan.ended("a", "r")
    plan.drop_unread(keep={"a"})
    assert not plan.take_orders().evict
    plan.drop_unread(keep=set())
    assert plan.take_orders().evict == ["a"]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_memory_holds_and_readers_are_safe_and_all_are_served(seed):
    """A crowd of requests over more contexts than fit."""
    draw = random.Random(seed)
    sizes = {key: draw.randint(1, 6) for key in "abcdefgh"}
    plan, memory = Residency(10), set()
    reading, waiting, served = {}, {}, 0
    for step in range(400):
        if step < 300 and draw.random() < 0.5:
            waiting[f"r{step}"] = draw.choice("abcdefgh")
        for reader, key in list(waiting.items()):
            if draw.random() < 0.02:
                del waiting[reader]
                plan.ended(key, reader)
            elif plan.read(key, key, sizes[key], reader):
                reading[reader] = waiting.pop(reader)
                served += 1
        for reader, key in list(reading.items()):
            if draw.random() < 0.3:
                plan.ended(key, reader)
                del reading[reader]
        orders = plan.take_orders()
        assert not set(orders.evict) & set(reading.values())
        memory -= set(orders.evict)
        memory |= set(orders.load)
        assert sum(sizes[key] for key in memory) <= 10
        for key in [k for k, one in plan.held.items() if one.state == LOADING]:
            if draw.random() < 0.5:
                plan.loaded(key)
    assert served > 50
    assert not waiting
