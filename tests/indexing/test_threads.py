"""Layers side by side: in order, one PyTorch thread each, and nothing left changed."""

import threading
import time

import pytest
import torch

from squeezed.indexing.threads import each_in_a_thread


def test_results_come_in_order_from_threads_of_one_loop_each():
    def work(number):
        return number * number, torch.get_num_threads(), threading.get_ident()

    before = torch.get_num_threads()
    squares, loops, idents = zip(*each_in_a_thread(work, range(20)), strict=True)
    assert squares == tuple(n * n for n in range(20))
    assert set(loops) == {1} and threading.get_ident() not in idents
    assert torch.get_num_threads() == before


def test_a_failing_layer_ends_the_others_and_reaches_the_caller():
    before, done = torch.get_num_threads(), []

    def work(number):
        if number == 3:
            raise ValueError("layer 3")
        time.sleep(0.002)
        done.append(number)
        return number

    with pytest.raises(ValueError, match="layer 3"):
        list(each_in_a_thread(work, range(1000)))
    assert len(done) < 1000 and torch.get_num_threads() == before
