"""Every recipe for GPUs fits on the GPUs in its name, and says how long it takes."""

from pathlib import Path

import pytest

from nrt_megatron.plan import load_hardware, plan
from nrt_megatron.recipe import load_recipe, num_updates_per_step

RECIPES = Path(__file__).parents[2] / "recipes"
LARGE = [path for path in sorted(RECIPES.glob("*.yaml")) if load_recipe(path).cluster.gpus_per_node]


def test_the_recipes_of_the_large_models_are_there():
    assert {path.stem for path in LARGE} == {
        "nrt-llama3.1-70b-16n8g-tp8pp4-fp8",
        "nrt-llama3.1-8b-1n8g-tp2",
        "nrt-llama3.1-8b-1n8g-tp2-fp8",
        "nrt-llama3.2-3b-1n8g",
        "nrt-mistral-7b-1n8g-tp2",
    }


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_fits_and_says_how_long(path):
    recipe = load_recipe(path)
    planned = plan(recipe, load_hardware("h100"), build=False)
    assert planned.fits and planned.first_change is None
    parts = (planned.rollout, planned.scoring, planned.update)
    assert all(phase.seconds > 0 and phase.tflops_per_gpu > 0 for phase in parts)
    assert planned.step_seconds == pytest.approx(sum(phase.seconds for phase in parts))
    assert planned.run_gpu_hours == pytest.approx(810 * planned.step_seconds * planned.gpus / 3600)
    assert planned.num_updates == num_updates_per_step(recipe) == 4
    # The watchdog must not end a rollout that takes as long as planned.
    assert 1.5 * planned.rollout.seconds < 60 * recipe.policy.megatron_cfg.distributed_timeout_minutes


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_settings_of_the_paper(path):
    recipe = load_recipe(path)
    nrt, policy, data = recipe.nrt, recipe.policy, recipe.data
    assert (nrt.preset, nrt.reward_scheme, nrt.token_signal) == ("reference", "weighted_log_prob", "fixed")
    assert (nrt.num_generations_per_prompt, nrt.num_prompts_per_step, nrt.max_num_steps) == (8, 256, 810)
    assert policy.train_global_batch_size == 64 * 8
    assert (data.max_prompt_tokens, policy.generation.max_new_tokens, data.max_answer_tokens) == (
        4096,
        2048,
        4096,
    )
    assert (policy.optimizer.lr, policy.optimizer.adam_beta2, policy.optimizer.weight_decay) == (
        2e-6,
        0.95,
        0.01,
    )
