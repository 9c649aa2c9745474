"""What a stopwatch adds up."""

from __future__ import annotations

import time

import pytest

from nrt_megatron.mcore.stopwatch import Stopwatch


def test_only_what_runs_under_it_counts_and_each_second_once():
    watch = Stopwatch()

    @watch.measuring
    def work(value: int) -> int:
        time.sleep(0.05)
        return value

    started = time.perf_counter()
    assert [work(1), work(value=2)] == [1, 2]
    worked = time.perf_counter() - started
    time.sleep(0.05)
    assert 0.1 <= watch.take() <= worked
    assert watch.take() == 0.0


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_stream_that_counts():
    import torch

    watch = Stopwatch()
    with watch.running():
        torch.cuda._sleep(100_000_000)
    torch.cuda.synchronize()
    assert watch.take() > 0.01
