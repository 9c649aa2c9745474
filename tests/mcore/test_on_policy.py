"""The sampler's log-probs are the trainer's, at every layout: the first update has ratio 1."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nrt_megatron.data import Example
from nrt_megatron.mcore.generate import MegatronGenerator
from nrt_megatron.recipe import NRT, Recipe
from nrt_megatron.rollout import local_share, rollout
from nrt_megatron.scoring import score, sequence_grid
from nrt_megatron.update import update
from tests.distributed import run_ranks
from tests.mcore import tiny
from tests.mcore.test_layouts import LAYOUTS

PROMPTS = [(1, 5, 6, 9), (11, 12), (3, 4, 5, 6, 7, 8), (13, 14, 15)]
K, MARKER, STOP = 4, (7,), (2, 3)


def settings(layout: dict, temperature: float) -> Recipe:
    recipe = tiny.recipe(mbs=2, **layout)
    policy = replace(recipe.policy, train_global_batch_size=K * len(PROMPTS))
    generation = replace(policy.generation, max_new_tokens=10, temperature=temperature)
    nrt = NRT(num_prompts_per_step=len(PROMPTS), num_generations_per_prompt=K, reward_scheme="geometric_mean")
    return replace(recipe, nrt=nrt, policy=replace(policy, generation=generation))


def step(directory, layout: dict, temperature: float) -> dict[str, float]:
    recipe = settings(layout, temperature)
    policy = tiny.policy(directory, recipe)
    generator = MegatronGenerator(
        policy.runtime, policy.chunks, recipe.policy.generation, marker_ids=MARKER, stop_ids=STOP,
        vocab_size=tiny.VOCAB, seed=1,
    )  # fmt: skip
    examples = [Example(i, p, (20 + i, 21, 2), "", "") for i, p in enumerate(PROMPTS)]
    scored = score(rollout(generator, local_share(examples, recipe, policy.runtime), recipe, draw=1), recipe.nrt)
    metrics = update(policy, sequence_grid(scored, MARKER), recipe)
    metrics.add(scored.metrics, scored.maxima)
    return metrics.reduce(policy.runtime)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.save_hf(tiny.LLAMA, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def alone(checkpoint):
    return run_ranks(1, step, checkpoint, {}, 1.0)[0]


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "recompute" not in name])
def test_sampler_and_trainer_agree(checkpoint, alone, name):
    world, layout = LAYOUTS[name]
    row = run_ranks(world, step, checkpoint, layout, 1.0)[0]
    assert row["logprob_gap/max"] < 1e-4
    assert row["ratio/mean"] == pytest.approx(1, abs=1e-4) and row["ratio/max"] == pytest.approx(1, abs=1e-4)
    assert row["ratio/drop_share"] == 0 and row["ratio/clip_share"] == 0
    assert row.keys() == alone.keys()
    for key in ("loss", "grad_norm", "reward/trace_mean", "trace/length_mean", "trace/entropy", "answer/nll"):
        assert row[key] == pytest.approx(alone[key], rel=1e-4, abs=1e-5), key


def test_sampled_tokens_are_scored_at_the_sampling_temperature(checkpoint):
    (row,) = run_ranks(1, step, checkpoint, {}, 1.7)
    assert row["logprob_gap/max"] < 1e-4 and row["ratio/max"] == pytest.approx(1, abs=1e-4)


def test_every_token_of_a_trace_is_counted(alone):
    """Trace tokens, produced markers and end tokens carry the policy gradient; forced markers do not."""
    assert (
        0 < alone["trace/marker_share"] + alone["trace/eos_share"] + alone["trace/truncated_share"] == pytest.approx(1)
    )
    assert alone["trace/eos_share"] > 0 and alone["trace/truncated_share"] > 0
