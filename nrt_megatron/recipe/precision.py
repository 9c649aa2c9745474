"""FP8 fields: which go together. Megatron accepts most of these mistakes silently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nrt_megatron.recipe.errors import ConfigError
from nrt_megatron.recipe.schema import Megatron, Recipe

_PREFIX = "policy.megatron_cfg."
_NEED_FP8 = ("fp8_param", "first_last_layers_bf16", "fp8_emulation")
_OF_DELAYED = ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo")
_REHEARSED = ("tensorwise", "blockwise")


def _refuse(recipe: Recipe, name: str, problem: str, remedy: str) -> None:
    raise ConfigError.at(_PREFIX + name, getattr(recipe.policy.megatron_cfg, name), problem, remedy)


def check_precision(recipe: Recipe) -> None:
    """Raises ConfigError for FP8 fields that would be ignored, or that Megatron refuses, together."""
    cfg, sampling = recipe.policy.megatron_cfg, recipe.policy.generation.fp8
    for name in _OF_DELAYED:
        default = getattr(Megatron, name)
        if getattr(cfg, name) != default and (cfg.fp8 is None or cfg.fp8_recipe != "delayed"):
            _refuse(recipe, name, f"only {_PREFIX}fp8_recipe delayed has it", f"set {default}")
    if cfg.fp8 is None:
        for name in _NEED_FP8:
            if getattr(cfg, name):
                _refuse(recipe, name, f"{_PREFIX}fp8 is null", f"set it to false, or {_PREFIX}fp8 to hybrid or e4m3")
        if sampling != "same":
            raise ConfigError.at("policy.generation.fp8", sampling, f"{_PREFIX}fp8 is null", "set same")
        return
    if cfg.fp8_param and sampling == "none":
        problem = f"there are no other weights than FP8 with {_PREFIX}fp8_param"
        raise ConfigError.at("policy.generation.fp8", sampling, problem, "set same")
    _check_rehearsal(recipe) if cfg.fp8_emulation else _check_transformer_engine(recipe)
    if cfg.first_last_layers_bf16 and cfg.fp8_recipe == "delayed":
        _refuse(recipe, "fp8_recipe", "scales all layers alike", "set tensorwise, or first_last_layers_bf16=false")


def _check_transformer_engine(recipe: Recipe) -> None:
    cfg, rehearse = (
        recipe.policy.megatron_cfg,
        "set null, or rehearse it with fp8_emulation=true and fp8_recipe=tensorwise",
    )
    if not recipe.cluster.gpus_per_node:
        _refuse(recipe, "fp8", "Transformer Engine needs a GPU, and cluster.gpus_per_node is 0", rehearse)
    if not cfg.bf16:
        _refuse(recipe, "fp8", "the other layers would be in float32", f"set {_PREFIX}bf16=true")
    if cfg.transformer_impl == "local":
        # Megatron's local layers ignore fp8 and train in bfloat16 without a word.
        _refuse(recipe, "fp8", "local layers have none", f"set {_PREFIX}transformer_impl=auto, or fp8_emulation=true")
    if cfg.fp8_param and not cfg.use_distributed_optimizer:
        remedy = f"set {_PREFIX}use_distributed_optimizer=true, or fp8_param=false"
        _refuse(recipe, "fp8_param", "the float32 copies are the distributed optimizer's", remedy)


def _check_rehearsal(recipe: Recipe) -> None:
    cfg = recipe.policy.megatron_cfg
    if cfg.transformer_impl == "transformer_engine":
        remedy = f"set it to false, or {_PREFIX}transformer_impl=local"
        _refuse(recipe, "fp8_emulation", "Transformer Engine's layers have FP8 itself", remedy)
    if cfg.fp8_recipe not in _REHEARSED:
        _refuse(
            recipe,
            "fp8_recipe",
            "not among the scalings that fp8_emulation rehearses",
            f"set {' or '.join(_REHEARSED)}",
        )
    if cfg.fp8_param:
        _refuse(recipe, "fp8_param", "fp8_emulation rounds weights that stay as they are", "set false")


def check_precision_shape(recipe: Recipe, config: Mapping[str, Any], source: str) -> None:
    """Whether FP8 fits a Hugging Face `config.json` with valid sizes. Raises ConfigError.

    Some layers are left to run in it, Megatron wants those left out at an end to be of one stage, and Transformer
    Engine's FP8 products want sides that are multiples of 16 on every tensor-parallel rank, or whole blocks in what
    ranks gather.
    """
    cfg, sizes = recipe.policy.megatron_cfg, {k: v for k, v in config.items() if type(v) is int and v > 0}
    if cfg.fp8 is None:
        return
    if cfg.first_last_layers_bf16 and "num_hidden_layers" in sizes:
        layers, start, end = sizes["num_hidden_layers"], cfg.num_layers_at_start_in_bf16, cfg.num_layers_at_end_in_bf16
        most = layers // cfg.pipeline_model_parallel_size
        for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
            if getattr(cfg, name) > most:
                _refuse(recipe, name, f"a pipeline stage of {source} has {most} layers", f"set at most {most}")
        if start + end >= layers:
            problem = f"with {start} layers at the start none of {layers} of {source} is left for FP8"
            remedy = f"set fewer than {layers} in all, or {_PREFIX}fp8=null"
            _refuse(recipe, "num_layers_at_end_in_bf16", problem, remedy)
    gathered = 128 if cfg.fp8_recipe == "blockwise" and cfg.sequence_parallel else 16
    sides = (("hidden_size", 1, gathered), ("intermediate_size", cfg.tensor_model_parallel_size, 16))
    for key, share, side in sides:
        if not cfg.fp8_emulation and key in sizes and sizes[key] // share % side:
            problem = f"{key} = {sizes[key]} of {source} over {share} ranks is no multiple of {side}"
            other = "sequence_parallel=false" if side == 128 else "another tensor_model_parallel_size"
            _refuse(recipe, "fp8", problem, f"set null, or {other}")
