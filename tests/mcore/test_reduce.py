"""Metrics of a step over ranks that know different parts of it."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nrt_megatron.mcore import runtime
from nrt_megatron.mcore.reduce import StepMetrics
from tests.distributed import run_ranks
from tests.mcore import tiny


def reduced():
    place = runtime.initialize(tiny.recipe(pipeline_model_parallel_size=2))
    metrics = StepMetrics(
        sums={"mean": (6.0, 2.0), "nothing": (0.0, 0.0)},
        maxima={"peak": 9.0 - place.rank, "unseen": -float("inf")},
        tokens={"rollout": 5.0},
    )
    with NoNumberRead():
        for total in (torch.tensor(3.0), torch.tensor(4.0)):
            metrics.add({"measured": (total, torch.tensor(7))}, {"peak": total, "least": -total, "top": 5.0})
    return metrics.reduce(place)


class NoNumberRead(TorchDispatchMode):
    """Fails where the host asks for a tensor's value: on a GPU it would wait there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read"
        return func(*args, **(kwargs or {}))


def test_sums_count_a_replica_once_and_maxima_every_rank():
    for row in run_ranks(2, reduced):
        assert row == {"mean": 3.0, "measured": 0.5, "tokens/rollout": 5.0, "peak": 9.0, "least": -3.0, "top": 5.0}
