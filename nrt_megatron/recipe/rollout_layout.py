"""A rollout at another layout than training: what it is, and what it must fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nrt_megatron.recipe.errors import ConfigError
from nrt_megatron.recipe.layout import check_training_shape, divisors, is_size, listed, nearest, uncut, world_size
from nrt_megatron.recipe.megatron import Megatron
from nrt_megatron.recipe.schema import Policy, Recipe

_CFG = "policy.megatron_cfg."
_TP = "policy.generation.tensor_model_parallel_size"
_PP = "policy.generation.pipeline_model_parallel_size"


def rollout_sizes(policy: Policy) -> tuple[int, int]:
    """Tensor and pipeline parallel size of rollout and evaluation."""
    cfg, generation = policy.megatron_cfg, policy.generation
    return (
        generation.tensor_model_parallel_size or cfg.tensor_model_parallel_size,
        generation.pipeline_model_parallel_size or cfg.pipeline_model_parallel_size,
    )


def has_rollout_layout(policy: Policy) -> bool:
    """Whether rollout has weights of its own, at another layout than training."""
    cfg = policy.megatron_cfg
    return rollout_sizes(policy) != (cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size)


def rollout_megatron(policy: Policy) -> Megatron:
    """Megatron's fields at the rollout's layout; training's own where that is the same.

    The padded vocabulary keeps its size, and what is about gradients or parts of sequences is off.
    """
    if not has_rollout_layout(policy):
        return policy.megatron_cfg
    cfg, (tp, pp) = policy.megatron_cfg, rollout_sizes(policy)
    return replace(
        uncut(cfg),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
        recompute_granularity=None,
        recompute_method=None,
        recompute_num_layers=None,
        make_vocab_size_divisible_by=cfg.make_vocab_size_divisible_by * cfg.tensor_model_parallel_size // tp,
    )


def check_rollout_layout(recipe: Recipe) -> None:
    """Raises ConfigError where the ranks, the padded vocabulary or the precision do not admit it."""
    policy = recipe.policy
    if not has_rollout_layout(policy):
        return
    cfg, (tp, pp), world = policy.megatron_cfg, rollout_sizes(policy), world_size(recipe)
    if world % (tp * pp):
        key, value, other = (_TP, tp, pp) if policy.generation.tensor_model_parallel_size else (_PP, pp, tp)
        problem = f"{world} ranks cannot be split into replicas of TP {tp} x PP {pp} for rollout"
        fitting = [n for n in divisors(world) if world % (n * other) == 0]
        raise ConfigError.at(key, value, problem, f"set {listed(nearest(fitting, value)) if fitting else 'null'}")
    rows = cfg.make_vocab_size_divisible_by * cfg.tensor_model_parallel_size
    if rows % tp:
        key, value = "make_vocab_size_divisible_by", cfg.make_vocab_size_divisible_by
        problem = f"a vocabulary padded to a multiple of {rows} cannot be cut into {tp} parts for rollout"
        raise ConfigError.at(_CFG + key, value, problem, f"set a multiple of {tp}, or {_TP} to a divisor of {rows}")
    if cfg.fp8_param:
        problem = "weights in FP8 cannot be moved to the rollout's layout"
        raise ConfigError.at(f"{_CFG}fp8_param", True, problem, f"set it to false, or {_TP} and {_PP} to null")
    if cfg.fp8 and cfg.fp8_recipe == "delayed" and policy.generation.fp8 == "same":
        problem = "delayed scaling learns its scales in training, and a rollout layout's weights are not trained"
        remedy = f"set none, {_CFG}fp8_recipe=tensorwise, or {_TP} and {_PP} to null"
        raise ConfigError.at("policy.generation.fp8", "same", problem, remedy)


def check_model_shape(recipe: Recipe, config: Mapping[str, Any], source: str) -> None:
    """Whether a Hugging Face `config.json` can be cut as the recipe says, for training and rollout.

    Raises ConfigError. Sizes that the config does not give, or gives in a form that is no positive integer, are left to
    the code that builds the model: it refuses them with their own message.
    """
    check_training_shape(recipe, config, source)
    if not has_rollout_layout(recipe.policy):
        return
    cfg, (tp, pp) = recipe.policy.megatron_cfg, rollout_sizes(recipe.policy)
    cut = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    sizes = {key: config[key] for key in cut if is_size(config.get(key))}
    valid = [n for n in divisors(min(sizes.values(), default=1)) if all(size % n == 0 for size in sizes.values())]
    for key, size in sizes.items():
        if size % tp:
            raise ConfigError.at(
                _TP, tp, f"does not divide {key} = {size} of {source}", f"set {listed(nearest(valid, tp))}"
            )
    layers = config.get("num_hidden_layers")
    if is_size(layers) and layers % pp:
        remedy = f"set {listed(nearest(divisors(layers), pp))}"
        raise ConfigError.at(_PP, pp, f"does not divide num_hidden_layers = {layers} of {source}", remedy)
    width = sizes.get("intermediate_size", 0) // tp
    if cfg.fp8 and not cfg.fp8_emulation and recipe.policy.generation.fp8 == "same" and width % 16:
        problem = f"leaves {width} of intermediate_size on a rank, no multiple of 16 as FP8 wants"
        remedy = "set another, or policy.generation.fp8=none"
        raise ConfigError.at(_TP, tp, problem, remedy)
