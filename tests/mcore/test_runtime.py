"""Phases that do not end, seeds, and the schedule's first step."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from nrt_megatron.mcore import runtime
from nrt_megatron.mcore.policy import MegatronPolicy
from nrt_megatron.recipe import Scheduler
from tests.distributed import run_ranks
from tests.mcore import tiny


def _hang() -> None:
    place = runtime.initialize(tiny.recipe(distributed_timeout_minutes=0.02))
    with place.phase("rollout, step 3"):
        with place.phase("quick"):
            pass
        if place.rank == 1:
            time.sleep(60)  # the other rank leaves the phase and ends
    while place.rank == 0:
        time.sleep(0.1)


def test_a_hung_rank_is_named_with_its_phase_and_stack():
    with pytest.raises(AssertionError) as failure:
        run_ranks(2, _hang, timeout=30)
    told = str(failure.value)
    assert "rank 1 ended with 1" in told
    assert "rank 1 on " in told and "phase rollout, step 3 did not finish within 1 s" in told
    assert "in _hang" in told, "the stack shows where"


def _rates(directory) -> list[float]:
    recipe = tiny.recipe()
    settings = replace(recipe.policy, scheduler=Scheduler(lr_warmup_fraction=0.4))
    built: MegatronPolicy = tiny.policy(directory, replace(recipe, policy=settings))
    rates = []
    for _ in range(10):
        built.scheduler.step(1)
        rates.append(built.optimizer.param_groups[0]["lr"])
    return rates


def test_warm_up_starts_above_zero(tmp_path):
    (rates,) = run_ranks(1, _rates, tiny.save_hf(tiny.LLAMA, tmp_path))
    assert rates == pytest.approx([0.0025, 0.005, 0.0075] + [0.01] * 7)


def _dropout(directory) -> set[float]:
    built = tiny.policy(directory, tiny.recipe())
    modules = [m for chunk in built.chunks for m in chunk.modules()]
    rates = {float(m.p) for m in modules if hasattr(m, "p") and "Dropout" in type(m).__name__}
    return rates | {built.chunks[0].config.hidden_dropout, built.chunks[0].config.attention_dropout}


def test_no_module_drops_out(tmp_path):
    assert run_ranks(1, _dropout, tiny.save_hf(tiny.LLAMA, tmp_path)) == [{0.0}]
