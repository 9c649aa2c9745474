"""FP8 fields, stages that count embedding and output layer, and what a plain training step needs."""

import json

import pytest

from nrt_megatron.recipe import ConfigError, check, check_files, check_training, load_recipe

from .conftest import CONFIG
from .test_checks import refusal

M = "policy.megatron_cfg."


GPU = ["cluster.gpus_per_node=4", f"{M}fp8=hybrid"]
REHEARSED = [f"{M}fp8=hybrid", f"{M}fp8_recipe=tensorwise", f"{M}fp8_emulation=true"]


@pytest.mark.parametrize(
    "overrides, message",
    [
        ([f"{M}fp8=E4M3"], "choose e4m3, hybrid"),
        ([f"{M}fp8=hybrid", f"{M}bf16=true", f"{M}fp8_recipe=bogus"], "choose tensorwise"),
        ([f"{M}fp8=hybrid", f"{M}bf16=true"], "rehearse it with fp8_emulation=true"),
        ([*GPU], "set policy.megatron_cfg.bf16=true"),
        ([*GPU, f"{M}bf16=true", f"{M}transformer_impl=local"], "local layers have none"),
        ([*GPU, f"{M}bf16=true", f"{M}first_last_layers_bf16=true"], "set tensorwise"),
        ([*GPU, f"{M}bf16=true", f"{M}fp8_param=true"], "use_distributed_optimizer=true"),
        ([f"{M}fp8_param=true"], "policy.megatron_cfg.fp8 to hybrid or e4m3"),
        ([f"{M}fp8_emulation=true"], "policy.megatron_cfg.fp8 is null"),
        ([f"{M}fp8_amax_history_len=16"], "delayed"),
        ([*REHEARSED, f"{M}fp8_amax_compute_algo=max"], "set most_recent"),
        (["policy.generation.fp8=none"], "policy.megatron_cfg.fp8 is null"),
        ([*GPU, f"{M}bf16=true", f"{M}fp8_param=true", "policy.generation.fp8=none"], "set same"),
        ([*REHEARSED, f"{M}fp8_recipe=delayed"], "set tensorwise or blockwise"),
        ([*REHEARSED, f"{M}fp8_param=true"], "set false"),
        ([*REHEARSED, "cluster.gpus_per_node=4", f"{M}transformer_impl=transformer_engine"], "transformer_impl=local"),
        (["nrt.rollout_importance_sampling=true", "nrt.reward_scheme=sft"], "samples no traces"),
    ],
)
def test_fp8_fields_that_megatron_would_ignore_are_refused(load, overrides, message):
    assert message in refusal(load(*overrides))


def test_fp8_runs_on_transformer_engine_or_rehearsed(load):
    edges = [f"{M}fp8_recipe=tensorwise", f"{M}first_last_layers_bf16=true"]
    for overrides in (
        [*GPU, f"{M}bf16=true", *edges],
        [*REHEARSED, *edges],
        [*REHEARSED, "policy.generation.fp8=none"],
    ):
        recipe = load(*overrides)
        check(recipe)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ([f"{M}num_layers_at_start_in_bf16=4", f"{M}num_layers_at_end_in_bf16=2"], "none of 6 of"),
        ([f"{M}num_layers_at_end_in_bf16=4", f"{M}pipeline_model_parallel_size=2"], "set at most 3"),
    ],
)
def test_some_layers_are_left_for_fp8(load, overrides, message):
    model = [CONFIG, "policy.tokenizer.path=t", *REHEARSED, f"{M}first_last_layers_bf16=true"]
    check(load(*model))
    assert message in refusal(load(*model, *overrides))


def test_transformer_engines_fp8_wants_sides_of_16(load):
    model = [CONFIG, "policy.tokenizer.path=t", *GPU, f"{M}bf16=true"]
    check(load(*model))
    assert "intermediate_size = 104" in refusal(load(*model, "policy.model.config.intermediate_size=104"))


def test_blocks_that_ranks_gather_are_whole(load):
    """transformer_engine.pytorch.utils.assert_dim_for_all_gather: tokens are padded, the hidden size cannot be."""
    model = [CONFIG, "policy.tokenizer.path=t", *GPU, f"{M}bf16=true", f"{M}fp8_recipe=blockwise"]
    shared = [*model, f"{M}tensor_model_parallel_size=2", f"{M}sequence_parallel=true"]
    check(load(*model))
    assert "hidden_size = 64" in (said := refusal(load(*shared))) and "128; set null, or sequence_parallel=f" in said
    check(load(*shared, "policy.model.config.hidden_size=128"))


def test_embedding_and_output_layer_count_as_layers(load):
    """6 layers and two more fill 4 stages of 2; without them 6 layers do not fill 4."""
    stages = [CONFIG, "policy.tokenizer.path=t", "cluster.cpu_ranks=8", f"{M}pipeline_model_parallel_size=4"]
    assert "num_hidden_layers = 6" in refusal(load(*stages))
    flags = [f"{M}account_for_{name}_in_pipeline_split=true" for name in ("embedding", "loss")]
    check(load(*stages, *flags, "policy.train_global_batch_size=32", "policy.train_micro_batch_size=1"))
    assert "= 6 + 1 " in refusal(load(*stages, flags[0]))


def test_a_training_step_needs_policy_and_cluster_alone(write):
    path = write(
        "policy: {train_global_batch_size: 6, megatron_cfg: {tensor_model_parallel_size: 2}, model: {}}\n"
        "cluster: {gpus_per_node: 0, cpu_ranks: 4}\n"
    )
    with pytest.raises(ConfigError, match=r"data.train"):
        load_recipe(path)
    recipe = load_recipe(path, [], ["data.train=unused", f"{M}context_parallel_size=2"])
    check_training(recipe)
    uneven = load_recipe(path, [], ["data.train=unused", "policy.train_global_batch_size=5"])
    assert "set 4 or 6" in refusal(uneven, check_training)


def test_the_model_that_was_planned_is_the_one_at_the_path(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"hidden_size": 64, "vocab_size": 101}))
    check_files(load("policy.model.shape={hidden_size: 64, vocab_size: 100, rope_theta: 1.0}"))
    message = refusal(load("policy.model.shape={hidden_size: 128}"), check_files)
    assert "policy.model.shape.hidden_size = 128" in message and "has 64" in message
