"""Everything that can be wrong in a recipe by itself, found before a rank starts. Looks at no file."""

from __future__ import annotations

from functools import partial

from nrt_megatron.recipe.errors import ConfigError, check_all
from nrt_megatron.recipe.layout import (
    check_batches,
    check_ranks,
    check_sequence_cut,
    check_training_batch,
    num_traces_per_prompt,
)
from nrt_megatron.recipe.limits import SIGNS, check_values
from nrt_megatron.recipe.precision import check_precision
from nrt_megatron.recipe.rollout_layout import check_model_shape, check_rollout_layout
from nrt_megatron.recipe.schema import Recipe
from nrt_megatron.recipe.watch import Sign


def check(recipe: Recipe) -> None:
    """Raises ConfigError for the values that cannot work by themselves, or else together with others.

    Pure: a recipe for 128 GPUs can be checked on a laptop. Files are looked at by `check_files`.
    """
    check_values(recipe)
    independent = (
        _check_model_source,
        _check_tokenizer_source,
        _check_megatron,
        check_precision,
        check_ranks,
        check_sequence_cut,
        check_rollout_layout,
        _check_inline_shapes,
        _check_objective,
        _check_lengths,
        _check_rollout_batch,
        _check_schedule,
        _check_watch,
    )
    check_all(*(partial(check, recipe) for check in independent))
    check_batches(recipe)


def check_training(recipe: Recipe) -> None:
    """Of `policy` and `cluster` what a plain training step needs: no traces, tokenizer, data. Raises ConfigError."""
    check_values(recipe)
    _check_megatron(recipe)
    check_precision(recipe)
    check_ranks(recipe)
    check_sequence_cut(recipe)
    _check_inline_shapes(recipe)
    check_training_batch(recipe)


def _check_inline_shapes(recipe: Recipe) -> None:
    model = recipe.policy.model
    for name in ("config", "shape"):
        if getattr(model, name) is not None:
            check_model_shape(recipe, getattr(model, name), f"policy.model.{name}")


def _check_model_source(recipe: Recipe) -> None:
    model = recipe.policy.model
    if model.path is None and model.config is None:
        remedy = "set policy.model.path to a directory, or policy.model.config to a config.json inline"
        raise ConfigError.at("policy.model.path", None, "no model is given", remedy)
    if model.path is not None and model.config is not None:
        problem = "given together with policy.model.config, which means random weights"
        raise ConfigError.at("policy.model.path", model.path, problem, "set one of the two to null")


def _check_tokenizer_source(recipe: Recipe) -> None:
    model, tokenizer = recipe.policy.model, recipe.policy.tokenizer
    if tokenizer.path is None and model.path is None and model.config is not None:
        problem = "a model from policy.model.config brings no tokenizer"
        raise ConfigError.at(
            "policy.tokenizer.path", None, problem, "set a directory with tokenizer.json or tokenizer.model"
        )


def _check_megatron(recipe: Recipe) -> None:
    cfg, prefix = recipe.policy.megatron_cfg, "policy.megatron_cfg."

    def refuse(name: str, problem: str, remedy: str) -> None:
        raise ConfigError.at(prefix + name, getattr(cfg, name), problem, remedy)

    if cfg.sequence_parallel and cfg.tensor_model_parallel_size == 1:
        refuse(
            "sequence_parallel",
            "there is one tensor-parallel rank",
            "set it to false, or tensor_model_parallel_size to 2 or more",
        )
    if cfg.virtual_pipeline_model_parallel_size and cfg.pipeline_model_parallel_size == 1:
        refuse(
            "virtual_pipeline_model_parallel_size",
            "there is one pipeline stage",
            "set it to null, or pipeline_model_parallel_size to 2 or more",
        )
    if cfg.overlap_param_gather and not (cfg.use_distributed_optimizer and cfg.overlap_grad_reduce):
        refuse(
            "overlap_param_gather",
            "needs the distributed optimizer and overlapped reduction",
            f"set {prefix}use_distributed_optimizer and {prefix}overlap_grad_reduce to true",
        )
    if cfg.transformer_impl == "transformer_engine" and not recipe.cluster.gpus_per_node:
        refuse(
            "transformer_impl",
            "Transformer Engine needs a GPU, and cluster.gpus_per_node is 0",
            "set auto or local",
        )
    for name in ("recompute_method", "recompute_num_layers"):
        if cfg.recompute_granularity == "full" and getattr(cfg, name) is None:
            refuse(
                name,
                "recompute_granularity full needs it",
                "set uniform and 1" if name.endswith("method") else "set 1",
            )
        if cfg.recompute_granularity != "full" and getattr(cfg, name) is not None:
            refuse(
                name,
                "only recompute_granularity full has it",
                f"set it to null, or {prefix}recompute_granularity to full",
            )


def _check_objective(recipe: Recipe) -> None:
    nrt = recipe.nrt
    if nrt.rollout_importance_sampling and nrt.reward_scheme == "sft":
        problem = "nrt.reward_scheme sft samples no traces"
        raise ConfigError.at("nrt.rollout_importance_sampling", True, problem, "set it to false")
    alone = [key for key in ("center_reward_by", "scale_reward_by") if getattr(nrt, key) != "none"]
    if nrt.num_generations_per_prompt == 1 and alone and nrt.reward_scheme != "sft":
        keys = " and ".join(f"nrt.{key} = {getattr(nrt, key)!r}" for key in alone)
        problem = f"one trace has no group to be compared with ({keys}): every advantage would be 0"
        if alone == ["scale_reward_by"]:
            problem = f"one trace has no standard deviation ({keys})"
        remedy = f"set 2 or more, or {' '.join(f'nrt.{key}=none' for key in alone)}"
        raise ConfigError.at("nrt.num_generations_per_prompt", 1, problem, remedy)
    for low, high in (("ratio_clip_min", "ratio_clip_max"), ("ratio_drop_min", "ratio_drop_max")):
        if getattr(nrt, low) > getattr(nrt, high):
            problem = f"above nrt.{high} = {getattr(nrt, high)}"
            raise ConfigError.at(f"nrt.{low}", getattr(nrt, low), problem, f"set at most {getattr(nrt, high)}")


def _check_lengths(recipe: Recipe) -> None:
    """A prompt, a whole trace, a marker and an answer of one token each must fit."""
    total, trace = recipe.policy.max_total_sequence_length, recipe.policy.generation.max_new_tokens
    trace = 0 if recipe.nrt.reward_scheme == "sft" else trace
    if trace >= total:
        problem = f"a trace of policy.generation.max_new_tokens = {trace} leaves no room for prompt and answer"
        remedy = f"set more than {trace}, or policy.generation.max_new_tokens below {total}"
        raise ConfigError.at("policy.max_total_sequence_length", total, problem, remedy)
    for key, value in (
        ("max_prompt_tokens", recipe.data.max_prompt_tokens),
        ("max_answer_tokens", recipe.data.max_answer_tokens),
    ):
        if value is not None and value + trace >= total:
            problem = f"with a trace of {trace} it fills policy.max_total_sequence_length = {total}"
            remedy = f"set at most {total - trace - 1}" if total - trace > 1 else f"set the total above {value + trace}"
            raise ConfigError.at(f"data.{key}", value, problem, remedy)


def _check_rollout_batch(recipe: Recipe) -> None:
    """The traces of a prompt are decoded together."""
    rows, tokens = recipe.policy.generation.max_batch_size, recipe.policy.generation.max_cache_tokens
    traces, longest = num_traces_per_prompt(recipe), recipe.policy.max_total_sequence_length + 1
    if rows < traces:
        problem = f"the {traces} traces of a prompt are decoded together"
        raise ConfigError.at("policy.generation.max_batch_size", rows, problem, f"set at least {traces}")
    if tokens is not None and tokens < traces * longest:
        problem = f"the {traces} traces of a prompt, decoded together, may need {traces} x {longest}"
        raise ConfigError.at("policy.generation.max_cache_tokens", tokens, problem, f"set at least {traces * longest}")


def _check_schedule(recipe: Recipe) -> None:
    optimizer = recipe.policy.optimizer
    if optimizer.min_lr > optimizer.lr:
        problem = f"above policy.optimizer.lr = {optimizer.lr}"
        raise ConfigError.at("policy.optimizer.min_lr", optimizer.min_lr, problem, f"set at most {optimizer.lr}")
    if recipe.evaluation.every and recipe.data.validation is None:
        problem = "there is nothing to evaluate on (data.validation is null)"
        raise ConfigError.at(
            "evaluation.every", recipe.evaluation.every, problem, "set data.validation, or evaluation.every=0"
        )


def _check_watch(recipe: Recipe) -> None:
    for name in SIGNS:
        sign: Sign = getattr(recipe.watch, name)
        if sign.below is not None and sign.above is not None and sign.below > sign.above:
            problem = f"above watch.{name}.above = {sign.above}, so that every value would be outside"
            raise ConfigError.at(f"watch.{name}.below", sign.below, problem, f"set at most {sign.above}")
        if sign.below is None and sign.above is None and sign.action != "warn":
            problem = f"the sign has no bound, so that it would never {sign.action}"
            remedy = f"set watch.{name}.below or watch.{name}.above, or warn"
            raise ConfigError.at(f"watch.{name}.action", sign.action, problem, remedy)
