"""bfloat16 on CPU ranks: the optimizer's copy stays float32, and the gap that rounding leaves is reported."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nrt_megatron.recipe import Optimizer
from nrt_megatron.update import update
from tests.distributed import run_ranks
from tests.mcore import test_layouts, test_on_policy, tiny
from tests.mcore.test_layouts import PP, TP

LAYOUTS = {
    "tp2": (2, {TP: 2}),
    "tp2-sp": (2, {TP: 2, "sequence_parallel": True}),
    "pp2": (2, {PP: 2}),
    "dp2": (2, {}),
    "dp2-distopt": (2, {"use_distributed_optimizer": True}),
    "tp2-dp2-distopt": (4, {TP: 2, "use_distributed_optimizer": True}),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.save_hf(tiny.LLAMA, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def exact(checkpoint):
    return run_ranks(1, test_on_policy.step, checkpoint, {}, 1.0)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_in_bf16_is_near_that_in_fp32_and_reports_its_gap(checkpoint, exact, name):
    world, layout = LAYOUTS[name]
    row = run_ranks(world, test_on_policy.step, checkpoint, {**layout, "bf16": True}, 1.0)[0]
    assert 1e-5 < row["logprob_gap/abs_mean"] < 1e-2 and row["logprob_gap/max"] < 0.1
    assert row["ratio/mean"] == pytest.approx(1, abs=1e-2) and row["update/skipped_share"] == 0
    # Single draws tip over, and with them whole traces: the same quantities, not the same traces.
    for key, tolerance in (("grad_norm", 0.1), ("answer/nll", 0.02), ("reward/trace_mean", 0.1)):
        assert row[key] == pytest.approx(exact[key], rel=tolerance), key


def small_steps(directory, layout: dict) -> tuple[torch.Tensor, list[float]]:
    """Updates far below a bfloat16's last bit; the drift of a weight of 1, and the answers' nll."""
    recipe = test_layouts.settings(8, layout)
    recipe = replace(
        recipe,
        nrt=replace(recipe.nrt, reward_scheme="sft", num_prompts_per_step=8, loss_normalizer=8.0),
        policy=replace(recipe.policy, optimizer=Optimizer(lr=5e-4, adam_eps=1e-8, weight_decay=0.0)),
    )
    policy = tiny.policy(directory, recipe)
    weight = policy.chunks[0].decoder.layers[0].input_layernorm.weight
    assert weight.dtype == torch.bfloat16
    before = weight.detach().float().clone()
    grid = test_layouts.local(tiny.grid(8), policy)
    nll = [update(policy, grid, recipe).reduce(policy.runtime)["answer/nll"] for _ in range(16)]
    return weight.detach().float() - before, nll


@pytest.mark.parametrize("name", ["tp2", "dp2-distopt"])
def test_updates_below_the_last_bit_of_bf16_add_up(checkpoint, name):
    """1 + 5e-4 is 1 in bfloat16 (last bit 2^-7 above 1, 2^-8 below); 16 such steps in float32 are not nothing."""
    world, layout = LAYOUTS[name]
    moved, nll = run_ranks(world, small_steps, checkpoint, {**layout, "bf16": True})[0]
    assert (moved != 0).float().mean() > 0.2 and moved.abs().max() < 0.02
    assert nll[-1] < nll[0] - 0.05
