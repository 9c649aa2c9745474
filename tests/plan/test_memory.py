"""Bytes by hand; and what a plan says of CPU ranks against their resident memory."""

from dataclasses import replace

import pytest

from nrt_megatron.convert.config import ModelShape
from nrt_megatron.plan import load_hardware, plan
from nrt_megatron.plan.costs import Costs, Pass
from nrt_megatron.plan.layout import Layout
from nrt_megatron.plan.memory import GIB, in_flight, layer_activations, stage_memory
from nrt_megatron.plan.rollout import Lengths, RolloutBatch
from nrt_megatron.recipe import Cluster, Data, Generation, Megatron, Model, Policy, Recipe, SequencePacking

from .test_parameters import LLAMA_70B


def recipe(tp=8, pp=4, gpus=128, config=LLAMA_70B, generation=None, data=None, **megatron) -> Recipe:
    cfg = Megatron(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, bf16=True, **megatron)
    return Recipe(
        policy=Policy(
            model=Model(config=config),
            megatron_cfg=cfg,
            max_total_sequence_length=8192,
            generation=generation or Generation(),
        ),
        data=data or Data(train="unused"),
        cluster=Cluster(num_nodes=gpus // 8, gpus_per_node=8),
    )


def costs(settings: Recipe) -> Costs:
    shape = ModelShape.from_hf(settings.policy.model.config)
    return Costs(shape, settings.policy.megatron_cfg, Layout.of(settings, shape, load_hardware("h100")))


def test_what_stays_on_a_rank():
    """Parameters take 2 + 4 bytes each, and 12 shared by the ranks that hold the same ones."""
    plain = plan(recipe(), load_hardware("h100"), True, build=False).stages[1]
    bytes_each = [gib * GIB / plain.parameters for gib in (plain.weights_gib, plain.gradients_gib, plain.optimizer_gib)]
    assert bytes_each == pytest.approx([2, 4, 12])
    shared = plan(recipe(use_distributed_optimizer=True), load_hardware("h100"), True, build=False).stages[1]
    assert shared.optimizer_gib == pytest.approx(plain.optimizer_gib / 4)
    parts = (
        plain.weights_gib,
        plain.gradients_gib,
        plain.optimizer_gib,
        plain.activations_gib,
        plain.workspace_gib,
    )
    assert plain.total_gib == pytest.approx(sum(parts)) and plain.kv_cache_gib == 0


def test_fp8_copies_of_weights():
    """Two bytes a parameter of the linear layers, or these instead of the bf16 ones; 18 of 20 layers of the ends."""
    shared = {"use_distributed_optimizer": True}
    bf16 = plan(recipe(**shared), load_hardware("h100"), True, build=False).stages[1]
    matrices = 20 * 855_638_016 / 8
    fp8 = {"fp8": "hybrid", "fp8_recipe": "tensorwise", **shared}
    both = plan(recipe(**fp8), load_hardware("h100"), True, build=False).stages[1]
    alone = plan(recipe(**fp8, fp8_param=True), load_hardware("h100"), True, build=False).stages[1]
    assert (both.weights_gib - bf16.weights_gib) * GIB == pytest.approx(2 * matrices)
    assert alone.weights_gib == pytest.approx(bf16.weights_gib)
    ends = recipe(**fp8, first_last_layers_bf16=True, num_layers_at_start_in_bf16=2)
    assert [stage.fp8_layers for stage in costs(ends).layout.stages] == [18, 20, 20, 19]


def test_activations_of_a_layer():
    """Llama-70B, TP 8 with sequence parallelism, bf16, bytes a token: norms and linear inputs 4 x 2 x 8192 / 8;
    queries and attention output 2 x 2 x 8192, keys and values 2 x 2 x 1024, SwiGLU 2 x 2 x 28672 and its product
    2 x 28672, a sum a head 4 x 64, over 8."""
    by_hand = 4 * 2 * 8192 / 8 + (2 * 2 * 8192 + 2 * 2 * 1024 + 3 * 2 * 28672 + 4 * 64) / 8
    assert layer_activations(costs(recipe(sequence_parallel=True))) == by_hand
    assert layer_activations(costs(recipe())) == by_hand + 4 * 2 * 8192 * 7 / 8
    # In FP8 the inputs of the four linear maps are bytes, and the attention's output is kept beside its FP8 copy.
    fp8 = layer_activations(costs(recipe(sequence_parallel=True)), fp8=True)
    assert by_hand - fp8 == 2 * 8192 / 8 + (28672 - 8192) / 8


def test_micro_batches_in_flight():
    """1F1B: as many as stages are left. Interleaved: Korthikanti et al. 2022, eq. 5: L (1 + (p - 1) / (p v)) layers."""
    assert [in_flight(stage, 4, 1, 16) for stage in range(4)] == [4, 3, 2, 1]
    assert [in_flight(stage, 4, 1, 2) for stage in range(4)] == [2, 2, 2, 1]
    p, v = 8, 5
    assert in_flight(0, p, v, 64) / v == pytest.approx(p * (1 + (p - 1) / (p * v)), rel=0.01)


def test_recomputation_keeps_inputs_alone():
    """Uniform, one layer a unit: 2 x 8192 bytes a token and layer, over TP with sequence parallelism."""
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    settings = recipe(sequence_parallel=True, **full)
    stage = plan(settings, load_hardware("h100"), True, build=False).stages[1]
    kept = 8192 * (3 * 20 * 2 * 8192 / 8 + layer_activations(costs(settings)))
    assert stage.activations_gib * GIB == pytest.approx(kept)
    plain = plan(recipe(sequence_parallel=True), load_hardware("h100"), True, build=False).stages[1]
    assert plain.activations_gib * GIB == pytest.approx(8192 * 3 * 20 * layer_activations(costs(settings)))


def test_layers_share_the_mask_of_a_micro_batch():
    """Trees of 8,000 columns, three micro-batches in flight on the second of four stages: 2 x 8000 x 8000 bytes each;
    keys and values of 20 layers in the kernel for masks are of 64 heads, not 8."""
    at = costs(recipe(sequence_parallel=True))
    stage = at.layout.stages[1]
    tree, row = Pass(1, 8000, branches=4, trunk=1000), Pass(1, 8000)
    packed, plain = (stage_memory(at, stage, work, 16, None).activations for work in (tree, row))
    heads = 2 * 2 * (64 - 8) * 128 / 8 * 8000 * 20 * 3
    assert packed - plain == pytest.approx(3 * 2 * 8000**2 + heads)
    assert layer_activations(at, masked=True) - layer_activations(at) == 2 * 2 * (64 - 8) * 128 / 8
    selective = costs(recipe(recompute_granularity="selective"))
    assert layer_activations(selective, masked=True) == layer_activations(selective)
    # Two chunks, the first of four stages: 2 x 3 + 4 + 1 passes, of seven micro-batches.
    chunks = costs(recipe(virtual_pipeline_model_parallel_size=2, recompute_granularity="selective"))
    packed, plain = (stage_memory(chunks, chunks.layout.stages[0], w, 16, None).activations for w in (tree, row))
    assert packed - plain == pytest.approx(7 * 2 * 8000**2)


def test_the_mask_of_a_sliding_window_is_that_of_all_sequences():
    """Beyond the window; under context parallelism of the keys that a chunk of 1,000 can see."""
    at = costs(recipe(recompute_granularity="selective"))
    windowed = replace(at, shape=replace(at.shape, sliding_window=4000))
    held = [stage_memory(c, c.layout.stages[3], Pass(4, 8000), 16, None).activations for c in (at, windowed)]
    assert held[1] - held[0] == pytest.approx(2 * 8000**2)
    inside = stage_memory(windowed, windowed.layout.stages[3], Pass(4, 4000), 16, None)
    assert inside == stage_memory(at, at.layout.stages[3], Pass(4, 4000), 16, None)
    shared = replace(windowed, layout=costs(recipe(context_parallel_size=4)).layout)
    plain = replace(shared, shape=at.shape)
    held = [stage_memory(c, c.layout.stages[3], Pass(4, 8000), 16, None).activations for c in (plain, shared)]
    assert held[1] - held[0] == pytest.approx(2 * 2000 * 5000)


def test_the_largest_tree_has_long_traces():
    """Eight of 2048 + 1 + 500 tokens behind a prompt of 1,000."""
    data = Data(train="unused", max_prompt_tokens=1000, max_answer_tokens=500)
    settings = recipe(data=data, generation=Generation(max_new_tokens=2048), recompute_granularity="selective")
    policy = replace(
        settings.policy,
        tokenizer=replace(settings.policy.tokenizer, path="t"),
        train_micro_batch_size=8,
        sequence_packing=SequencePacking(enabled=True),
    )
    last = plan(replace(settings, policy=policy), load_hardware("h100"), build=False).stages[3]
    width = 1000 + 8 * (2048 + 1 + 500)
    final = 4 * 2 * 8192
    kept = width * (20 * layer_activations(costs(settings)) + final) + 2 * width**2
    assert last.activations_gib * GIB == pytest.approx(kept)


def test_kv_cache_of_the_largest_batch():
    """One key-value head of 128 a rank, key and value in bf16, 20 layers: 10,240 bytes a row and column."""
    generation = Generation(max_new_tokens=2048, max_batch_size=70)
    settings = recipe(generation=generation, data=Data(train="unused", max_prompt_tokens=1000, max_answer_tokens=500))
    batch = RolloutBatch.of(settings, 64, Lengths.limits(settings))
    assert (batch.prompts, batch.rows, batch.lengths.columns) == (8, 64, 1000 + 2048 + 1 + 500 + 1)
    at = costs(settings)
    # Eight batches take turns on four stages: four caches.
    assert batch.cache_bytes(at, at.layout.stages[0]) == 4 * 10_240 * 64 * 3550
    assert RolloutBatch.of(settings, 16, Lengths.limits(settings)).in_flight == 2
    bounded = replace(generation, max_batch_size=256, max_cache_tokens=64 * 3550)
    bounded = RolloutBatch.of(replace(settings, policy=replace(settings.policy, generation=bounded)), 64, batch.lengths)
    assert (bounded.rows, bounded.most_prompts * bounded.traces) == (64, 256)
    assert bounded.cache_bytes(at, at.layout.stages[0]) == 4 * 10_240 * 64 * 3550
    unlimited = replace(settings, data=Data(train="unused"))
    assert Lengths.limits(unlimited) == Lengths(8192 - 2049 - 2, 2048, 8192 - 2049 - 1)


def test_peak_is_of_the_larger_phase():
    settings = recipe(generation=Generation(max_batch_size=512), use_distributed_optimizer=True)
    settings = replace(
        settings, policy=replace(settings.policy, tokenizer=replace(settings.policy.tokenizer, path="t"))
    )
    stage = plan(settings, load_hardware("h100"), build=False).stages[1]
    stays = stage.weights_gib + stage.gradients_gib + stage.optimizer_gib
    assert stage.total_gib == pytest.approx(stays + stage.kv_cache_gib + stage.workspace_gib)
    assert stage.total_gib < stays + stage.kv_cache_gib + stage.workspace_gib + stage.activations_gib
