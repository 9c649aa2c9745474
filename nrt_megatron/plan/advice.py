"""The first change to try where a recipe does not fit: found by planning the changed recipes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from nrt_megatron.plan.estimate import Request, estimate
from nrt_megatron.recipe import (
    ConfigError,
    Recipe,
    check,
    check_model_shape,
    check_training,
    num_traces_per_prompt,
)

_CFG = "policy.megatron_cfg."
_BATCH = "policy.generation.max_batch_size"
_CACHE = "policy.generation.max_cache_tokens"
_MICRO = "policy.train_micro_batch_size"
_PACKING = "policy.sequence_packing.enabled"

Change = dict[str, Any]
"""Dotted keys and their new values."""


def first_change(request: Request) -> str:
    """One line: the change that costs the least speed and makes the recipe fit, alone or with further ones."""
    peak = estimate(request).peak_gib
    together: Change = {}
    for change in _changes(request):
        alone = _peak(request, change)
        if alone is not None and alone[1]:
            return f"set {_text(change)}: {alone[0]:.1f} GiB"
    for change in _changes(request):
        outcome = _peak(request, together | change)
        if outcome is not None and outcome[0] < peak:
            together, peak = together | change, outcome[0]
            if outcome[1]:
                return f"set {_text(together)}: {peak:.1f} GiB"
    if not together:
        return "no change of one setting helps; take GPUs with more memory"
    return f"set {_text(together)} and take more GPUs: still {peak:.1f} GiB"


def _changes(request: Request) -> Iterator[Change]:
    """From changes that cost nothing to those that cost the most."""
    policy, traces = request.recipe.policy, num_traces_per_prompt(request.recipe)
    cfg = policy.megatron_cfg
    yield {f"{_CFG}use_distributed_optimizer": True}
    if request.moves:
        yield {f"policy.generation.{kind}_model_parallel_size": None for kind in ("tensor", "pipeline")}
    if cfg.tensor_model_parallel_size > 1:
        yield {f"{_CFG}sequence_parallel": True}
    if request.samples:
        if policy.generation.max_cache_tokens is not None:
            yield from ({_CACHE: tokens} for tokens in _halves(policy.generation.max_cache_tokens, 1))
        yield from ({_BATCH: rows} for rows in _halves(policy.generation.max_batch_size, traces))
    yield from ({_MICRO: size} for size in _halves(policy.train_micro_batch_size, 1))
    if policy.sequence_packing.enabled:
        sizes = (policy.train_micro_batch_size, *_halves(policy.train_micro_batch_size, 1))
        yield from ({_PACKING: False, _MICRO: size} for size in sizes)
    yield {
        f"{_CFG}recompute_granularity": "full",
        f"{_CFG}recompute_method": "uniform",
        f"{_CFG}recompute_num_layers": 1,
    }
    for tp in _doubles(cfg.tensor_model_parallel_size, request.recipe.cluster.gpus_per_node):
        yield {f"{_CFG}tensor_model_parallel_size": tp, f"{_CFG}sequence_parallel": True}
    for cp in _doubles(cfg.context_parallel_size, request.recipe.cluster.gpus_per_node):
        yield {f"{_CFG}context_parallel_size": cp}
    for pp in _doubles(cfg.pipeline_model_parallel_size, request.shape.num_layers):
        yield {f"{_CFG}pipeline_model_parallel_size": pp, f"{_CFG}virtual_pipeline_model_parallel_size": None}
    for nodes in _doubles(request.recipe.cluster.num_nodes, 16 * request.recipe.cluster.num_nodes):
        yield {"cluster.num_nodes": nodes}


def _halves(value: int, least: int) -> Iterator[int]:
    while value // 2 >= least:
        value //= 2
        yield value


def _doubles(value: int, most: int) -> Iterator[int]:
    while value * 2 <= most:
        value *= 2
        yield value


def _peak(request: Request, change: Change) -> tuple[float, bool] | None:
    """Peak in GiB and whether it fits; None for a change that changes nothing or makes an impossible recipe."""
    recipe = request.recipe
    for key, value in change.items():
        recipe = _replace(recipe, key.split("."), value)
    if recipe == request.recipe:
        return None
    try:
        _check(request, recipe)
    except ConfigError:
        return None
    planned = estimate(dataclasses.replace(request, recipe=recipe))
    return planned.peak_gib, planned.fits


def _check(request: Request, recipe: Recipe) -> None:
    check_training(recipe) if request.lengths is None else check(recipe)
    check_model_shape(recipe, request.shape.to_hf(), "the model")


def _replace(section: Any, path: list[str], value: Any) -> Any:
    head, *rest = path
    inner = _replace(getattr(section, head), rest, value) if rest else value
    return dataclasses.replace(section, **{head: inner})


def _text(change: Change) -> str:
    return " ".join(f"{key}={'null' if value is None else str(value).lower()}" for key, value in change.items())
