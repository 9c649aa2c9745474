"""Puts memory, time and traffic of a recipe together."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from nrt_megatron.convert.config import ModelShape
from nrt_megatron.plan import efficiency
from nrt_megatron.plan.costs import Costs, Pass
from nrt_megatron.plan.gpus import Hardware
from nrt_megatron.plan.layout import Layout, Stage
from nrt_megatron.plan.memory import GIB, StageMemory, stage_memory
from nrt_megatron.plan.parameters import stage_parameters
from nrt_megatron.plan.reshard import Move, move, rollout_costs
from nrt_megatron.plan.result import Phase, Plan, StagePlan
from nrt_megatron.plan.rollout import MARKER, Lengths, RolloutBatch, rollout_work
from nrt_megatron.plan.traffic import update_traffic
from nrt_megatron.plan.training import forward_time, update_time
from nrt_megatron.recipe import (
    Recipe,
    has_rollout_layout,
    num_traces_per_prompt,
    num_updates_per_step,
    token_multiple,
)


@dataclass(frozen=True)
class Request:
    """What to plan. `lengths`: averages, or None for one plain training update of full sequences."""

    recipe: Recipe
    shape: ModelShape
    hardware: Hardware
    lengths: Lengths | None
    name: str = ""

    @property
    def samples(self) -> bool:
        return self.lengths is not None and self.recipe.nrt.reward_scheme != "sft"

    @property
    def moves(self) -> bool:
        """Whether rollout has weights of its own."""
        return self.lengths is not None and has_rollout_layout(self.recipe.policy)


def estimate(request: Request) -> Plan:
    """The plan of a recipe that has been checked."""
    recipe, layout = request.recipe, Layout.of(request.recipe, request.shape, request.hardware)
    costs = Costs(request.shape, recipe.policy.megatron_cfg, layout)
    sequences = recipe.policy.train_global_batch_size
    num_micro_batches = sequences // layout.dp // recipe.policy.train_micro_batch_size
    micro_batch = _micro_batch(request)
    fed = _padded(request, micro_batch)
    one = update_time(costs, fed, num_micro_batches, chunked_loss=request.lengths is not None)
    num_updates = 1 if request.lengths is None else num_updates_per_step(recipe)
    every = num_updates * num_micro_batches * layout.dp
    tokens = every * micro_batch.sequences * micro_batch.tokens
    flops = every * 3 * costs.model_flops(micro_batch)
    update = Phase.of(num_updates * one.seconds, tokens, flops, layout.gpus)
    rollout, scoring, moved = Phase(), Phase(), Move()
    drawing = rollout_costs(recipe, costs) if request.moves else None
    if request.samples:
        rollout, scoring = _rollout(request, costs, micro_batch, num_updates * num_micro_batches)
        moved = move(costs, drawing) if drawing else moved
    stages = _stages(request, costs, num_micro_batches)
    usable = request.hardware.memory_gib - efficiency.RESERVED_GIB
    seconds = rollout.seconds + scoring.seconds + update.seconds + moved.seconds
    return Plan(
        recipe=request.name,
        hardware=request.hardware.name,
        memory_gib=usable,
        gpus=layout.gpus,
        layout=layout.sizes,
        training_only=request.lengths is None,
        tokens_per_sequence=_tokens(request),
        stages=stages,
        fits=max(stage.total_gib for stage in stages) <= usable,
        rollout=rollout,
        scoring=scoring,
        update=update,
        num_updates=num_updates,
        update_seconds=one.by_cause,
        pipeline_bubble=one.bubble_share,
        traffic_gib={kind: sent / GIB for kind, sent in update_traffic(costs, fed, num_micro_batches).items()},
        step_seconds=seconds,
        num_steps=recipe.nrt.max_num_steps,
        run_gpu_hours=seconds * recipe.nrt.max_num_steps * layout.gpus / 3600,
        rollout_layout=drawing.layout.sizes if drawing else None,
        rollout_parameters=[_parameters(drawing, stage) for stage in drawing.layout.stages] if drawing else [],
        reshard_gib=moved.received / GIB,
        reshard_seconds=moved.seconds,
    )


def _tokens(request: Request) -> dict[str, float]:
    if request.lengths is None:
        return {"total": float(request.recipe.policy.max_total_sequence_length)}
    return {**vars(request.lengths), "total": request.lengths.total}


def _micro_batch(request: Request) -> Pass:
    """One micro-batch of average sequences; packed ones are trees, a prompt with all its traces."""
    policy = request.recipe.policy
    if request.lengths is None:
        return Pass(policy.train_micro_batch_size, policy.max_total_sequence_length)
    lengths, branches = request.lengths, num_traces_per_prompt(request.recipe)
    scored = lengths.total - lengths.prompt
    if not policy.sequence_packing.enabled:
        return Pass(policy.train_micro_batch_size, lengths.total, scored=scored)
    tokens = lengths.prompt + branches * scored
    trees = policy.train_micro_batch_size / branches
    return Pass(trees, tokens, branches=branches, trunk=lengths.prompt, scored=branches * scored)


def _padded(request: Request, work: Pass) -> Pass:
    """`work` with the padding that its layout and number format want of a row: on average half of what they want a
    multiple of, where lengths differ."""
    multiple = token_multiple(request.recipe.policy)
    if request.lengths is None:
        tokens = math.ceil(work.tokens / multiple) * multiple
    else:
        tokens = work.tokens + (multiple - 1) / 2
    return replace(work, tokens=tokens, scored=work.num_scored / work.sequences)


def _longest_micro_batch(request: Request) -> Pass:
    """The largest that the recipe admits, padded; in a tree traces and answers are at their limits."""
    policy, multiple = request.recipe.policy, token_multiple(request.recipe.policy)
    work = Pass(policy.train_micro_batch_size, policy.max_total_sequence_length)
    if request.lengths is not None and policy.sequence_packing.enabled:
        branches, limits = num_traces_per_prompt(request.recipe), Lengths.limits(request.recipe)
        behind = limits.total - limits.prompt
        prompt = min(limits.prompt, work.tokens - behind)
        work = Pass(work.sequences / branches, prompt + branches * behind, branches=branches, trunk=prompt)
    return replace(work, tokens=math.ceil(work.tokens / multiple) * multiple)


def _rollout(request: Request, costs: Costs, micro_batch: Pass, num_micro_batches: int) -> tuple[Phase, Phase]:
    """Sampling; and scoring, with the trainer's own log-probs of all sequences where the recipe weighs by them."""
    assert request.lengths is not None
    prompts = request.recipe.nrt.num_prompts_per_step
    drawing = rollout_costs(request.recipe, costs)
    batch = RolloutBatch.of(request.recipe, math.ceil(prompts / drawing.layout.dp), request.lengths)
    work = rollout_work(drawing, batch, prompts / drawing.layout.dp)
    sampled = prompts * batch.traces * request.lengths.trace
    scored = prompts * (batch.traces + 1) * (MARKER + request.lengths.answer)
    seconds, flops = work.scoring_seconds, work.scoring_flops
    if request.recipe.nrt.rollout_importance_sampling:
        seconds += forward_time(costs, _padded(request, micro_batch), num_micro_batches)
        flops += num_micro_batches * costs.layout.dp * costs.model_flops(micro_batch)
    return (
        Phase.of(work.sampling_seconds, sampled, work.sampling_flops, costs.layout.gpus),
        Phase.of(seconds, scored, flops, costs.layout.gpus),
    )


def _stages(request: Request, costs: Costs, num_micro_batches: int) -> list[StagePlan]:
    """Memory of every stage, for the longest sequences that the recipe admits."""
    recipe, layout = request.recipe, costs.layout
    longest = _longest_micro_batch(request)
    drawing, batch = rollout_costs(recipe, costs), None
    if request.samples:
        of_rank = math.ceil(recipe.nrt.num_prompts_per_step / drawing.layout.dp)
        batch = RolloutBatch.of(recipe, of_rank, Lengths.limits(recipe))
    own = drawing if request.moves else None
    plans = []
    for stage in layout.stages:
        memory = stage_memory(costs, stage, longest, num_micro_batches, batch, own)
        plans.append(_stage_plan(stage.layers, _parameters(costs, stage), memory))
    return plans


def _parameters(costs: Costs, stage: Stage) -> int:
    return stage_parameters(costs.shape, costs.cfg, costs.layout, stage)


def _stage_plan(layers: int, parameters: int, memory: StageMemory) -> StagePlan:
    return StagePlan(
        layers=layers,
        parameters=parameters,
        weights_gib=memory.weights / GIB,
        gradients_gib=memory.gradients / GIB,
        optimizer_gib=memory.optimizer / GIB,
        activations_gib=memory.activations / GIB,
        kv_cache_gib=memory.kv_cache / GIB,
        workspace_gib=memory.workspace / GIB,
        total_gib=memory.total / GIB,
        rollout_weights_gib=memory.rollout_weights / GIB,
    )
