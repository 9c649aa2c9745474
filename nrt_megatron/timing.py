"""What a step costs: the seconds of its phases, and of each rank next to its peers; the memory."""

from __future__ import annotations

import math
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from nrt_megatron.mcore import HAS_GPU
from nrt_megatron.mcore.place import Place
from nrt_megatron.mcore.reduce import from_all
from nrt_megatron.mcore.stopwatch import Stopwatch
from nrt_megatron.recipe import Watch
from nrt_megatron.watch import Position, Stragglers

_PHASES = ("rollout", "scoring", "update")


class StepTimes:
    """Collects the times of a step on every rank, and compares those of all ranks on the main one."""

    def __init__(self, cfg: Watch, place: Place, forwards: Stopwatch, drawing_place: Place, drawing: Stopwatch) -> None:
        """Collective: tells the ranks where each one is.

        forwards: of the forward passes of this rank's updates, at `place`; drawing: of its generator, at
        `drawing_place` (see `mcore.stopwatch`).
        """
        self._device, self._forwards, self._drawing = place.device, forwards, drawing
        self._seconds: dict[str, float] = {}
        self._scoring = 0.0
        self._stragglers = Stragglers(_positions(place, drawing_place), cfg.straggler_ratio, cfg.straggler_steps)

    @contextmanager
    def measured(self, phase: str) -> Iterator[None]:
        """Adds the seconds of what is inside, until the device has done it, to a phase."""
        started = time.perf_counter()
        yield
        torch.cuda.synchronize()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - started

    def scored_within_rollout(self, seconds: float) -> None:
        """So many seconds of the rollout measured last were those of scoring."""
        self._scoring = seconds
        self._seconds["scoring"] = seconds
        self._seconds["rollout"] -= seconds

    def take(self) -> tuple[dict[str, float], list[str]]:
        """Metrics of the step now over, and lines about a rank that is slow again and again. Collective.

        `time/PHASE`: seconds on this rank, waits included. `straggler/...`: of the ranks' own work, as in
        `watch.Stragglers`; one small exchange.
        """
        rollout, update = self._drawing.take(), self._forwards.take()
        own = {"rollout": rollout - self._scoring, "scoring": self._scoring} if rollout else {}
        own |= {"update": update}
        table = from_all([own.get(phase, math.nan) for phase in _PHASES], self._device)
        metrics, lines = self._stragglers.judge(dict(zip(_PHASES, map(list, zip(*table)), strict=True)))
        metrics |= {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
        self._seconds, self._scoring = {}, 0.0
        return metrics, lines


def _positions(place: Place, drawing: Place) -> dict[str, list[Position]]:
    """Phase -> position of every rank."""
    mine = (socket.gethostname(), place.dp_rank, place.pp_rank, drawing.sampling_rank)
    everyone = [mine] * place.world_size
    dist.all_gather_object(everyone, mine)
    draw = [Position(host, replica, 0) for host, _, _, replica in everyone]
    train = [Position(host, replica, stage) for host, replica, stage, _ in everyone]
    return {"rollout": draw, "scoring": draw, "update": train}


def peak_memory() -> float:
    """Bytes: of the GPU's allocator, or resident on a CPU."""
    if HAS_GPU:
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
