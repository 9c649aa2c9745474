"""The optimizer updates of one step, mini-batch by mini-batch."""

from __future__ import annotations

from functools import partial

import torch

from nrt_megatron.data.batch import MicroBatch, SequenceGrid, micro_batches
from nrt_megatron.mcore.policy import MegatronPolicy
from nrt_megatron.mcore.reduce import StepMetrics
from nrt_megatron.objective.loss import LOSS_MAXIMA, LOSS_METRICS, nrt_loss
from nrt_megatron.recipe import Recipe, num_traces_per_prompt
from nrt_megatron.replay import NotFiniteError


def update(policy: MegatronPolicy, grid: SequenceGrid, recipe: Recipe) -> StepMetrics:
    """Updates the policy on this rank's sequences, in the order in which their prompts were drawn.

    The sequences of a mini-batch are cut into micro-batches by length; sums over tokens are divided once, by
    the loss normaliser and the number of sequences of the global mini-batch, so the result does not depend on
    the cut. Metrics of the loss are known on the last pipeline stage alone and zero counts elsewhere.

    An update whose loss or gradient is not finite is skipped and counted. Raises NotFiniteError, on all ranks, when
    `nrt.max_skipped_updates` were skipped in a row.
    """
    loss_fn = partial(nrt_loss, settings=recipe.nrt)
    plan = _mini_batches(policy, grid, recipe)
    if recipe.nrt.rollout_importance_sampling:  # all of it before the first update moves the policy
        plan = [policy.with_own_log_probs(batches) for batches in plan]
    total = StepMetrics()
    for batches in plan:
        done = policy.update(batches, loss_fn)
        if policy.skipped_in_a_row >= recipe.nrt.max_skipped_updates:
            policy.gather_weights()
            raise NotFiniteError(batches)
        fed = sum(batch.tokens.numel() for batch in batches)
        used = sum(batch.num_tokens for batch in batches)
        total.add(dict.fromkeys(("loss", *LOSS_METRICS), (0.0, 0.0)), dict.fromkeys(LOSS_MAXIMA, -torch.inf))
        for result in done.results:
            total.add(result.loss.metrics | {"loss": (result.loss.loss_sum.detach(), result.num_sequences)})
            total.add({}, result.loss.maxima)
        total.add({"update/padding_share": (fed - used, fed), "grad_norm": (done.grad_norm, 1.0)})
        total.add({"update/skipped_share": (float(not done.applied), 1.0)})
        total.values |= {"lr": done.lr}
        total.tokens["update"] = total.tokens.get("update", 0) + used
    policy.gather_weights()
    return total


def _mini_batches(policy: MegatronPolicy, grid: SequenceGrid, recipe: Recipe) -> list[list[MicroBatch]]:
    """The micro-batches of each update of a step."""
    per_rank = recipe.policy.train_global_batch_size // policy.runtime.dp_size
    packed = recipe.policy.sequence_packing.enabled
    return [
        micro_batches(
            grid,
            index,
            recipe.policy.train_micro_batch_size,
            temperature=recipe.policy.generation.temperature,
            pad_multiple=policy.pad_multiple,
            same_width=recipe.policy.megatron_cfg.virtual_pipeline_model_parallel_size is not None,
            traces_per_tree=num_traces_per_prompt(recipe) if packed else 0,
        )
        for index in torch.arange(len(grid), device=grid.tokens.device).split(per_rank)
    ]
