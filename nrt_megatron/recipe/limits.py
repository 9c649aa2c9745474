"""What each single value may be: numeric ranges and lists of choices, one line a key."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, get_type_hints

from nrt_megatron.recipe.errors import ConfigError
from nrt_megatron.recipe.keys import leaf_types
from nrt_megatron.recipe.presets import PRESETS
from nrt_megatron.recipe.schema import Recipe
from nrt_megatron.recipe.watch import Sign, Watch


@dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`; a bound with `open_` set is itself left out."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        low = f"{'above' if self.open_low else 'at least'} {self.low:.16g}" if self.low > -math.inf else ""
        high = f"{'below' if self.open_high else 'at most'} {self.high:.16g}" if self.high < math.inf else ""
        return "a finite number " + (" and ".join(filter(None, (low, high))) or "of any sign")


POSITIVE = Range(1)  # integers
COUNT = Range(0)  # integers, 0 switches off
ABOVE_ZERO = Range(0, open_low=True)
NOT_NEGATIVE = Range(0)
FRACTION = Range(0, 1)
BETA = Range(0, 1, open_high=True)

SIGNS = tuple(name for name, kind in get_type_hints(Watch).items() if kind is Sign)
"""Keys of `watch` that are signs of collapse."""

RANGES: dict[str, Range] = {
    "nrt.num_prompts_per_step": Range(1, 2**20),
    "nrt.num_generations_per_prompt": Range(1, 2**16),
    "nrt.max_num_steps": POSITIVE,
    "nrt.seed": Range(0, 2**63 - 1),
    "nrt.trace_loss_weight": NOT_NEGATIVE,
    "nrt.format_loss_weight": NOT_NEGATIVE,
    "nrt.token_loss_weight": NOT_NEGATIVE,
    "nrt.ratio_clip_min": NOT_NEGATIVE,
    "nrt.ratio_clip_max": ABOVE_ZERO,
    "nrt.ratio_drop_min": NOT_NEGATIVE,
    "nrt.ratio_drop_max": ABOVE_ZERO,
    "nrt.loss_normalizer": ABOVE_ZERO,
    "nrt.log_prob_error": NOT_NEGATIVE,
    "nrt.max_inverse_prob_weight": ABOVE_ZERO,
    "nrt.rollout_importance_cap": ABOVE_ZERO,
    "nrt.empty_trace_penalty": NOT_NEGATIVE,
    "nrt.truncated_trace_penalty": NOT_NEGATIVE,
    "nrt.max_skipped_updates": POSITIVE,
    "policy.train_global_batch_size": POSITIVE,
    "policy.train_micro_batch_size": POSITIVE,
    "policy.max_total_sequence_length": Range(2),
    "policy.megatron_cfg.tensor_model_parallel_size": POSITIVE,
    "policy.megatron_cfg.pipeline_model_parallel_size": POSITIVE,
    "policy.megatron_cfg.virtual_pipeline_model_parallel_size": Range(2),
    "policy.megatron_cfg.context_parallel_size": POSITIVE,
    "policy.megatron_cfg.fp8_margin": COUNT,
    "policy.megatron_cfg.fp8_amax_history_len": POSITIVE,
    "policy.megatron_cfg.num_layers_at_start_in_bf16": COUNT,
    "policy.megatron_cfg.num_layers_at_end_in_bf16": COUNT,
    "policy.megatron_cfg.recompute_num_layers": POSITIVE,
    "policy.megatron_cfg.make_vocab_size_divisible_by": POSITIVE,
    "policy.megatron_cfg.distributed_timeout_minutes": ABOVE_ZERO,
    "policy.megatron_cfg.logprob_chunk_size": POSITIVE,
    "policy.generation.max_new_tokens": POSITIVE,
    "policy.generation.temperature": ABOVE_ZERO,
    "policy.generation.top_p": Range(0, 1, open_low=True),
    "policy.generation.top_k": COUNT,
    "policy.generation.max_batch_size": POSITIVE,
    "policy.generation.max_cache_tokens": POSITIVE,
    "policy.generation.max_tokens_per_forward": POSITIVE,
    "policy.generation.tensor_model_parallel_size": POSITIVE,
    "policy.generation.pipeline_model_parallel_size": POSITIVE,
    "policy.optimizer.lr": ABOVE_ZERO,
    "policy.optimizer.min_lr": NOT_NEGATIVE,
    "policy.optimizer.weight_decay": NOT_NEGATIVE,
    "policy.optimizer.adam_beta1": BETA,
    "policy.optimizer.adam_beta2": BETA,
    "policy.optimizer.adam_eps": ABOVE_ZERO,
    "policy.optimizer.clip_grad": NOT_NEGATIVE,
    "policy.scheduler.lr_warmup_fraction": FRACTION,
    "data.max_prompt_tokens": POSITIVE,
    "data.max_answer_tokens": POSITIVE,
    "evaluation.every": COUNT,
    "evaluation.num_questions": POSITIVE,
    "evaluation.batch_size": POSITIVE,
    "evaluation.max_answer_tokens": POSITIVE,
    "checkpointing.every": POSITIVE,
    "checkpointing.keep_last": POSITIVE,
    "checkpointing.keep_every": COUNT,
    "logger.samples_every": COUNT,
    "logger.samples_num_prompts": POSITIVE,
    **{f"watch.{sign}.{bound}": NOT_NEGATIVE for sign in SIGNS for bound in ("below", "above")},
    **{f"watch.{sign}.steps": POSITIVE for sign in SIGNS},
    "watch.max_rollbacks": COUNT,
    "watch.straggler_ratio": Range(1, open_low=True),
    "watch.straggler_steps": POSITIVE,
    "cluster.num_nodes": POSITIVE,
    "cluster.gpus_per_node": COUNT,
    "cluster.cpu_ranks": POSITIVE,
}
"""Every key that holds a number; a null of an optional key is not looked at."""

SCHEMES = (
    "log_prob",
    "prob",
    "geometric_mean",
    "arithmetic_mean",
    "weighted_inverse_prob",
    "weighted_log_prob",
    "sft",
)

CHOICES: dict[str, tuple[str, ...]] = {
    "nrt.reward_scheme": SCHEMES,
    "nrt.preset": tuple(PRESETS),
    "nrt.center_reward_by": ("mean", "none"),
    "nrt.scale_reward_by": ("std", "none"),
    "nrt.token_signal": ("fixed", "raw", "normalised"),
    "policy.megatron_cfg.transformer_impl": ("auto", "local", "transformer_engine"),
    "policy.megatron_cfg.fp8": ("e4m3", "hybrid"),
    "policy.megatron_cfg.fp8_recipe": ("tensorwise", "delayed", "blockwise", "mxfp8"),
    "policy.megatron_cfg.fp8_amax_compute_algo": ("most_recent", "max"),
    "policy.megatron_cfg.recompute_granularity": ("full", "selective"),
    "policy.megatron_cfg.recompute_method": ("uniform", "block"),
    "policy.generation.fp8": ("same", "none"),
    "policy.scheduler.lr_decay_style": ("constant", "linear", "cosine"),
    "data.on_bad_row": ("error", "drop"),
    **{f"watch.{sign}.action": ("warn", "stop", "rollback") for sign in SIGNS},
}
"""Keys with a closed list of values."""

NOT_EMPTY = (
    "run_dir",
    "prepare",
    "policy.model.path",
    "policy.model.config",
    "policy.model.shape",
    "policy.tokenizer.path",
    "policy.tokenizer.marker",
    "policy.tokenizer.marker_init",
    "data.train",
    "data.validation",
    "data.question_key",
    "data.answer_key",
    "data.messages_key",
    "data.prompt_template",
)
"""Keys whose text or mapping says something, or is null."""

MATCHES = ("exact", "last_word", "after:TEXT")


def value_of(recipe: Recipe, key: str) -> Any:
    """The value of a dotted key."""
    return operator.attrgetter(key)(recipe)


def check_values(recipe: Recipe) -> None:
    """Each value by itself. Raises ConfigError for the first one outside its range or its choices."""
    for key, value in ((key, value_of(recipe, key)) for key in leaf_types()):
        if value is None:
            continue
        if key in RANGES and value not in RANGES[key]:
            raise ConfigError.at(key, value, "out of range", f"set {RANGES[key]}")
        if key in CHOICES and value not in CHOICES[key]:
            raise ConfigError.at(key, value, "unknown value", f"choose {', '.join(CHOICES[key])}")
        if key in NOT_EMPTY and not (value.strip() if isinstance(value, str) else value):
            raise ConfigError.at(key, value, "empty", "set a value, or remove the key for its default")
    _check_match(recipe.evaluation.match)
    _check_template(recipe.data.prompt_template)


def _check_match(match: str) -> None:
    if match not in MATCHES[:2] and not (match.startswith("after:") and match != "after:"):
        raise ConfigError.at("evaluation.match", match, "unknown value", f"choose {', '.join(MATCHES)}")


def _check_template(template: str | None) -> None:
    if template not in (None, "chat") and "{question}" not in template:
        problem = "holds no {question}, so every prompt would be the same"
        raise ConfigError.at("data.prompt_template", template, problem, "write {question} into it, or set chat")
