"""A rollout at a layout of its own, by hand: weights held twice, the move, and what it saves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nrt_megatron.plan import efficiency, load_hardware, plan
from nrt_megatron.plan.memory import GIB
from nrt_megatron.plan.reshard import rollout_costs, rollout_stages
from nrt_megatron.recipe import NRT, Data, Generation, Recipe, Tokenizer

from .test_memory import costs, recipe

H100 = load_hardware("h100")


def settings(rows: int = 128, generation: dict | None = None, **megatron) -> Recipe:
    """Llama-70B on 128 GPUs, TP 8 x PP 4 x DP 4; 256 prompts x 8 traces of at most 2,048 tokens."""
    how = Generation(max_batch_size=rows, **(generation or {}))
    made = recipe(generation=how, data=Data(train="unused", max_prompt_tokens=1024, max_answer_tokens=1024), **megatron)
    policy = replace(made.policy, tokenizer=Tokenizer(path="unused"), train_global_batch_size=512)
    return replace(made, policy=policy, nrt=NRT())


ONE_STAGE = {"pipeline_model_parallel_size": 1}


@pytest.fixture(scope="module")
def plans():
    return [plan(settings(generation=how), H100, build=False) for how in ({}, ONE_STAGE)]


def test_every_rank_holds_the_weights_of_one_stage_more(plans):
    same, other = plans
    assert same.rollout_layout is None and same.reshard_seconds == same.reshard_gib == 0
    assert other.rollout_layout == {"tensor": 8, "context": 1, "data": 16, "pipeline": 1, "chunks": 1}
    held = sum(stage.parameters for stage in same.stages)  # the stages of a tensor rank, together
    assert other.rollout_parameters == [held]
    for stage, before in zip(other.stages, same.stages):
        assert stage.rollout_weights_gib == pytest.approx(2 * held / GIB)
        # Four batches of 20 layers each took turns; now there is one of 80.
        assert stage.kv_cache_gib == pytest.approx(before.kv_cache_gib)
        rollout = stage.weights_gib + stage.gradients_gib + stage.optimizer_gib + stage.kv_cache_gib
        assert stage.total_gib >= rollout + stage.rollout_weights_gib


def test_the_move_by_hand(plans):
    """Three of four stages come over the network, 50 GB/s at 0.8; both sides are read once more for the checksum."""
    same, other = plans
    held = other.rollout_parameters[0]
    assert other.reshard_gib == pytest.approx(3 / 4 * 2 * held / GIB)
    trained = max(stage.parameters for stage in same.stages)
    memory = 3 * 2 * held + (2 + 32) * (held + trained)
    expected = 3 / 4 * 2 * held / 40e9 + memory / (3.35e12 * 0.85)
    assert other.reshard_seconds == pytest.approx(expected)
    phases = other.rollout.seconds + other.scoring.seconds + other.update.seconds
    assert other.step_seconds == pytest.approx(phases + expected)
    halves = plan(settings(generation={"tensor_model_parallel_size": 4, **ONE_STAGE}), H100, build=False)
    assert halves.reshard_gib == pytest.approx(2 * halves.rollout_parameters[0] / GIB)  # nothing counted as there


def test_a_rollout_without_stages_has_no_bubble():
    """One batch of 512 rows waits for four stages in turn; sixteen replicas draw 128 rows each without."""
    staged, whole = (plan(settings(512, generation=how), H100, build=False) for how in ({}, ONE_STAGE))
    assert whole.rollout.seconds < staged.rollout.seconds and whole.scoring.seconds < 0.8 * staged.scoring.seconds
    assert whole.update.seconds == staged.update.seconds


def test_which_stages_of_the_rollout_a_rank_holds():
    def held(**generation) -> list[list[int]]:
        made = settings(generation=generation)
        training = costs(made)
        rollout = rollout_costs(made, training).layout
        stages = [rollout_stages(training.layout, rollout, stage) for stage in training.layout.stages]
        return [[stage.index for stage in here] for here in stages]

    assert held(pipeline_model_parallel_size=1) == [[0]] * 4
    assert held(pipeline_model_parallel_size=2) == [[0], [0], [1], [1]]
    assert held(pipeline_model_parallel_size=8) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_giving_it_up_is_the_first_change_to_try():
    lean = {"use_distributed_optimizer": True, "sequence_parallel": True}
    recipes = [settings(generation=how, **lean) for how in ({}, ONE_STAGE)]
    less, more = (plan(made, H100, build=False).peak_gib for made in recipes)
    between = replace(H100, memory_gib=(less + more) / 2 + efficiency.RESERVED_GIB)
    other = plan(recipes[1], between, build=False)
    assert not other.fits and "policy.generation.pipeline_model_parallel_size=null" in str(other.first_change)


def test_its_ranks_are_built_as_well():
    """`plan` asserts that the built parameters of both layouts are those it counted."""
    made = settings(generation={"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2})
    assert len(plan(made, H100).rollout_parameters) == 2
