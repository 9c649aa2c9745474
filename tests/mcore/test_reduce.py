"""Metrics of a step over ranks that know different parts of it."""

from __future__ import annotations

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
    return metrics.reduce(place)


def test_sums_count_a_replica_once_and_maxima_every_rank():
    for row in run_ranks(2, reduced):
        assert row == {"mean": 3.0, "tokens/rollout": 5.0, "peak": 9.0}
