"""Times of tokens, from a clock that is moved by hand."""

import pytest
import torch

from squeezed.hf import clock as clocks
from squeezed.hf.clock import Clock


@pytest.fixture
def now(monkeypatch):
    moment = [10.0]
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: moment[0])
    return moment


def test_a_clock_tells_the_first_token_and_the_mean_of_the_others(now):
    clock = Clock()
    assert clock.seconds() == {"first_token": 0.0, "per_token": 0.0}
    for moment, length in ((11.0, 5), (11.5, 6), (13.0, 9)):
        now[0] = moment
        assert clock(torch.zeros(2, length, dtype=torch.long), None).tolist() == [False, False]
    assert clock.seconds() == {"first_token": 1.0, "per_token": 0.5}  # two seconds, four tokens
    assert clock.steps_ms(skip=0) == [500.0, 1500.0] and clock.steps_ms(skip=1) == [1500.0]


def test_a_clock_that_starts_again_forgets(now):
    clock = Clock()
    clock(torch.zeros(1, 3, dtype=torch.long), None)
    now[0] = 20.0
    clock.start()
    assert clock.times == [20.0] and clock.steps_ms(skip=0) == []
