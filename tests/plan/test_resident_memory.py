"""Weights, gradients, optimizer state and KV cache of CPU ranks: planned against resident memory."""

from __future__ import annotations

import ctypes
import gc
from functools import partial

import pytest

from nrt_megatron.convert.config import ModelShape
from nrt_megatron.plan import load_hardware
from nrt_megatron.plan.costs import Costs, Pass
from nrt_megatron.plan.layout import Layout
from nrt_megatron.plan.memory import stage_memory
from nrt_megatron.plan.rollout import Lengths, RolloutBatch
from nrt_megatron.recipe import Cluster, Data, Generation, Megatron, Model, Policy, Recipe
from tests.distributed import run_ranks

CONFIG = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 20,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 8192,
    "max_position_embeddings": 4096,
}
"""76 million parameters: 600 MB on each of two ranks, far above the 30 MB of libraries that a first update touches."""
ROWS, COLUMNS = 64, 128
LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2-distopt-bf16": {"use_distributed_optimizer": True, "bf16": True},
}


def settings(layout: dict) -> Recipe:
    return Recipe(
        policy=Policy(
            model=Model(config=CONFIG),
            train_global_batch_size=2,
            max_total_sequence_length=COLUMNS - 1,
            megatron_cfg=Megatron(make_vocab_size_divisible_by=8, **layout),
            generation=Generation(max_new_tokens=64, max_batch_size=ROWS),
        ),
        data=Data(train="unused", max_prompt_tokens=31, max_answer_tokens=31),
        cluster=Cluster(gpus_per_node=0, cpu_ranks=2),
    )


def resident() -> int:
    """Bytes of this process in memory, freed ones given back."""
    import psutil

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


def measure(layout: dict) -> tuple[int, int, int]:
    """This rank's stage, and bytes after one update and with a KV cache, above what it had without a model."""
    import torch

    from nrt_megatron.convert.seeded import SeededWeights
    from nrt_megatron.data.batch import micro_batches
    from nrt_megatron.mcore import runtime
    from nrt_megatron.mcore.kv_cache import KVCache, inference_mode
    from nrt_megatron.mcore.policy import MegatronPolicy
    from nrt_megatron.objective.loss import nrt_loss
    from tests.mcore import tiny

    recipe = settings(layout)
    place = runtime.initialize(recipe)
    shape = ModelShape.from_hf(CONFIG)
    before = resident()
    policy = MegatronPolicy(place, recipe.policy, shape, num_updates=1)
    policy.load(SeededWeights(shape, 1), shape)
    policy.prepare_for_training()
    grid = tiny.grid(2, traces=2)
    index = torch.arange(2).chunk(place.dp_size)[place.dp_rank]
    policy.update(micro_batches(grid, index, 1, temperature=1.0), partial(nrt_loss, settings=recipe.nrt))
    trained = resident() - before
    cache = KVCache(policy.chunks, ROWS, COLUMNS, max_tokens_per_forward=ROWS * COLUMNS)
    with inference_mode(policy.chunks):
        tokens = torch.zeros(ROWS, 1, dtype=torch.int64)
        cache.forward(tokens, tokens, None)
        for keys, values in cache.context.key_value_memory_dict.values():
            keys.zero_(), values.zero_()  # pages that were never written are not resident
    return place.pp_rank, trained, resident() - before


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_resident_memory_is_within_ten_percent_of_the_plan(layout):
    recipe, shape = settings(layout), ModelShape.from_hf(CONFIG)
    costs = Costs(shape, recipe.policy.megatron_cfg, Layout.of(recipe, shape, load_hardware("h100")))
    batch = RolloutBatch.of(recipe, prompts_of_rank=ROWS // 8, lengths=Lengths.limits(recipe))
    assert (batch.rows, batch.lengths.columns) == (ROWS, COLUMNS)
    for stage, trained, with_cache in run_ranks(2, measure, layout):
        planned = stage_memory(costs, costs.layout.stages[stage], Pass(1, 1), 1, batch)
        stays = planned.weights + planned.gradients + planned.optimizer
        measured = f"measured {trained:,} and {with_cache - trained:,}"
        print(f"stage {stage}: planned {stays:,.0f} and {planned.kv_cache:,.0f}, {measured}")
        assert trained == pytest.approx(stays, rel=0.1)
        assert with_cache == pytest.approx(stays + planned.kv_cache, rel=0.1)
