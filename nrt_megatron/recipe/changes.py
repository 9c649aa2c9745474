"""What differs between the recipe of a run so far and the one that is to continue it."""

from __future__ import annotations

from typing import Any

from nrt_megatron.recipe.errors import show
from nrt_megatron.recipe.keys import leaf_types
from nrt_megatron.recipe.limits import value_of
from nrt_megatron.recipe.schema import Recipe

_PLACES = ("run_dir",)
"""Keys that say where a run lies, which may be moved."""
_LAYOUT = (
    "cluster.",
    "checkpointing.",
    "logger.",
    "watch.straggler_",
    "prepare",
    "data.train",  # another file than the one the run began with is refused by its content
    "evaluation.batch_size",
    "policy.megatron_cfg.",
    "policy.model.shape",
    "policy.sequence_packing.",
    "policy.train_micro_batch_size",
    "policy.generation.max_batch_size",
    "policy.generation.max_cache_tokens",
    "policy.generation.max_tokens_per_forward",
)
_FP8 = ("fp8", "first_last_layers", "num_layers_at_")
"""Megatron's fields that change what is computed, not only where."""

_ABSENT = object()


def changes(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old value, new value) of every key that differs, `run_dir` left out.

    Keys inside a mapping, such as an inline model's, are compared one by one.
    """
    before, after = _flat(old), _flat(new)
    keys = [*before, *(key for key in after if key not in before)]
    pairs = {key: (before.get(key, _ABSENT), after.get(key, _ABSENT)) for key in keys if key not in _PLACES}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def is_layout(key: str) -> bool:
    """Whether a key decides where and in which portions something is computed, kept or shown, and not what."""
    name = key.rpartition(".")[2]
    return name.endswith("_parallel_size") or (key.startswith(_LAYOUT) and not name.startswith(_FP8))


def described(changed: dict[str, tuple[Any, Any]]) -> str:
    """`nrt.reward_scheme 'prob' -> 'log_prob', policy.optimizer.lr 0.0003 -> 0.0001`"""
    return ", ".join(f"{key} {_shown(old)} -> {_shown(new)}" for key, (old, new) in changed.items())


def _shown(value: Any) -> str:
    return "unset" if value is _ABSENT else show(value)


def _flat(recipe: Recipe) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key in leaf_types():
        value = value_of(recipe, key)
        flat |= {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
    return flat
