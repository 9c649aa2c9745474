"""FP8 fields: which go together. Megatron accepts any of these mistakes silently."""

from __future__ import annotations

from nrt_megatron.recipe.errors import ConfigError
from nrt_megatron.recipe.schema import Recipe

_PREFIX = "policy.megatron_cfg."
_NEED_FP8 = ("fp8_param", "first_last_layers_bf16", "fp8_emulation")


def check_precision(recipe: Recipe) -> None:
    """Raises ConfigError for FP8 fields that would be ignored, or that Megatron refuses, together."""
    cfg = recipe.policy.megatron_cfg

    def refuse(name: str, problem: str, remedy: str) -> None:
        raise ConfigError.at(_PREFIX + name, getattr(cfg, name), problem, remedy)

    if cfg.fp8 is None:
        for name in _NEED_FP8:
            if getattr(cfg, name):
                refuse(name, f"{_PREFIX}fp8 is null", f"set it to false, or {_PREFIX}fp8 to hybrid or e4m3")
        return
    if not cfg.bf16 and not cfg.fp8_emulation:
        refuse("fp8", "the other layers would be in float32", f"set {_PREFIX}bf16=true")
    if cfg.transformer_impl == "local" and not cfg.fp8_emulation:
        # Megatron's local layers ignore fp8 and train in bfloat16 without a word.
        refuse("fp8", "local layers have none", f"set {_PREFIX}transformer_impl=auto, or fp8_emulation=true")
    if cfg.first_last_layers_bf16 and cfg.fp8_recipe == "delayed":
        refuse("fp8_recipe", "scales all layers alike", "set tensorwise, or first_last_layers_bf16=false")


def check_built(recipe: Recipe) -> None:
    """Raises ConfigError for what can be planned and not be trained yet."""
    cfg = recipe.policy.megatron_cfg
    if cfg.fp8 is not None:
        raise ConfigError.at(_PREFIX + "fp8", cfg.fp8, "FP8 is planned but not yet run", "set null")
    for name in ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"):
        if getattr(cfg, name):
            raise ConfigError.at(_PREFIX + name, True, "planned but not yet run", "set false")
