"""`plan(recipe, hardware)`: what a run needs and how long it takes, before any GPU is booked."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nrt_megatron.checkpoints import CheckpointMeta, is_checkpoint
from nrt_megatron.convert.config import ModelShape
from nrt_megatron.plan.advice import first_change
from nrt_megatron.plan.build import built_parameters
from nrt_megatron.plan.estimate import Request, estimate
from nrt_megatron.plan.gpus import Hardware
from nrt_megatron.plan.result import Plan
from nrt_megatron.plan.rollout import MARKER, Lengths
from nrt_megatron.recipe import (
    ConfigError,
    Megatron,
    Recipe,
    check,
    check_model_shape,
    check_training,
    rollout_megatron,
)
from nrt_megatron.recipe.files import hint

PROMPT_TOKENS = 300.0
"""Average prompt where the caller names none (assumed)."""
ANSWER_TOKENS = 415.0
"""Average answer likewise: of tulu-3-sft-mixture, which the method's authors train on."""


def plan(
    recipe: Recipe,
    hardware: Hardware,
    training_only: bool = False,
    *,
    name: str = "",
    prompt_tokens: float = PROMPT_TOKENS,
    trace_tokens: float | None = None,
    answer_tokens: float = ANSWER_TOKENS,
    build: bool = True,
) -> Plan:
    """Plans a step of the recipe, or with `training_only` one plain update of full sequences, fused loss, no traces.

    Args:
        name: of the recipe, for the report.
        prompt_tokens, trace_tokens, answer_tokens: averages that times are for, cut to the recipe's limits; memory is
            always for the limits. trace_tokens None: every trace runs to its limit.
        build: count the parameters on every distinct rank, built on the meta device; else by arithmetic alone.

    Raises:
        ConfigError: the recipe cannot work, or does not tell the model's shape.
    """
    check_training(recipe) if training_only else check(recipe)
    shape = model_shape(recipe) if training_only else _with_marker(recipe, model_shape(recipe))
    check_model_shape(recipe, shape.to_hf(), "the model")
    lengths = None if training_only else Lengths.typical(recipe, prompt_tokens, trace_tokens, answer_tokens)
    request = Request(recipe, shape, hardware, lengths, name)
    planned = estimate(request)
    if build:
        _prove([stage.parameters for stage in planned.stages], shape, recipe.policy.megatron_cfg)
        if planned.rollout_parameters:
            _prove(planned.rollout_parameters, shape, rollout_megatron(recipe.policy))
    return planned if planned.fits else dataclasses.replace(planned, first_change=first_change(request))


def _prove(counted: list[int], shape: ModelShape, cfg: Megatron) -> None:
    built = built_parameters(shape, cfg)
    assert counted == built, f"arithmetic says {counted} parameters a stage, the built ranks have {built}"


def _with_marker(recipe: Recipe, shape: ModelShape) -> ModelShape:
    """The shape that is trained: an added marker takes a row of the vocabulary."""
    if not recipe.policy.tokenizer.add_marker:
        return shape
    return ModelShape.from_hf({**shape.to_hf(), "vocab_size": shape.vocab_size + MARKER})


def model_shape(recipe: Recipe) -> ModelShape:
    """The shape to plan: inline, of the directory where it is on this machine, else `policy.model.shape`.

    Raises ConfigError where the recipe tells none of the three.
    """
    model = recipe.policy.model
    if model.config is not None:
        return ModelShape.from_hf(model.config)
    path = Path(model.path) if model.path is not None else None
    if path is not None and is_checkpoint(path):
        return ModelShape.from_hf(CheckpointMeta.read(path).model)
    if path is not None and (path / "config.json").is_file():
        return ModelShape.from_dir(path)
    if model.shape is not None:
        return ModelShape.from_hf(model.shape)
    problem = "no model is given" if model.path is None else "not on this machine, so its shape is not known"
    remedy = f"set policy.model.shape to its config.json, inline{hint(model.path or '')}"
    raise ConfigError.at("policy.model.path", model.path, problem, remedy)
