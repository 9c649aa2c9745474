"""The seconds that a rank itself worked, measured without waiting for anything.

What can be told apart where collectives hide the wait:

- Rollout and scoring: while traces are drawn, nothing is exchanged between the replicas of the model that draw, so the
  whole of that time is a replica's own.
- Update: the forward passes of the micro-batches. In them a rank waits for no other stage and no other replica; the
  time around them holds the waits of the pipeline and of the gradients' reduction.
- Ranks that hold one stage of one replica (tensor- and context-parallel) wait for each other in every layer, on the
  device, and have one time between them.

Megatron's own `megatron.core.utils.StragglerDetector` times the same forward passes with the same events. It is not
used: it does nothing without CUDA, hands out no numbers but prints them, synchronises and broadcasts for every report,
reads temperatures through NVML, and opens a port on the first rank that whoever reaches it can switch it with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

from nrt_megatron.data.traces import Generated, Generator, Request
from nrt_megatron.mcore import HAS_GPU

P = ParamSpec("P")
T = TypeVar("T")


class Stopwatch:
    """Adds up the seconds of what runs under it; on a GPU those of its stream, by events that nobody waits for."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measures what is inside."""
        if not HAS_GPU:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._events.append((start, end))

    def measuring(self, function: Callable[P, T]) -> Callable[P, T]:
        """`function`, measured whenever it is called."""

        def measured(*args: P.args, **kwargs: P.kwargs) -> T:
            with self.running():
                return function(*args, **kwargs)

        return measured

    def take(self) -> float:
        """The seconds since the last call. The device must have finished what was measured."""
        seconds = self._seconds + sum(start.elapsed_time(end) for start, end in self._events) / 1e3
        self._seconds, self._events = 0.0, []
        return seconds


class MeasuredGenerator:
    """A generator whose seconds are measured."""

    def __init__(self, inner: Generator, stopwatch: Stopwatch) -> None:
        self.inner, self.stopwatch = inner, stopwatch

    def generate(self, request: Request) -> Generated:
        """As the inner one."""
        with self.stopwatch.running():
            return self.inner.generate(request)
