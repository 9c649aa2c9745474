"""Megatron's optimizer and learning-rate schedule from the recipe."""

from __future__ import annotations

import math

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from nrt_megatron.mcore.precision import has_te_fp8
from nrt_megatron.recipe import Policy


class GuardedOptimizer(ChainedOptimizer):
    """Leaves weights and moments as they are when the gradient is not finite; Megatron sees to that with fp16 alone.

    Told by the gradient's norm, which clipping needs anyway and which is the same on all ranks: a gradient that is not
    finite on one of them makes it so. `step` returns (False, None, None) then, and `grad_norm` holds the norm.
    """

    grad_norm = 0.0

    def prepare_grads(self) -> bool:
        """Whether the step is to be skipped."""
        skip = super().prepare_grads()
        self.grad_norm = super().get_grad_norm()
        return skip or not math.isfinite(self.grad_norm)

    def get_grad_norm(self) -> float:
        """The norm that `prepare_grads` found, before clipping; `step` asks for it after that."""
        return self.grad_norm


def build_optimizer(chunks: list[DistributedDataParallel], policy: Policy) -> GuardedOptimizer:
    """AdamW in fp32 master precision, with gradient clipping by the global norm; norms are not decayed."""
    cfg, megatron = policy.optimizer, policy.megatron_cfg
    config = OptimizerConfig(
        optimizer="adam",
        lr=cfg.lr,
        min_lr=cfg.min_lr,
        weight_decay=cfg.weight_decay,
        adam_beta1=cfg.adam_beta1,
        adam_beta2=cfg.adam_beta2,
        adam_eps=cfg.adam_eps,
        clip_grad=cfg.clip_grad,
        bf16=megatron.bf16,
        params_dtype=torch.bfloat16 if megatron.bf16 else torch.float32,
        use_distributed_optimizer=megatron.use_distributed_optimizer,
        overlap_param_gather=megatron.overlap_param_gather,
        fp8_recipe=megatron.fp8_recipe if has_te_fp8(megatron) else None,
        log_num_zeros_in_grad=False,
    )
    made = get_megatron_optimizer(config, chunks)
    assert isinstance(made, ChainedOptimizer), "Megatron chains the optimizers of dense and expert weights"
    return GuardedOptimizer(made.chained_optimizers)


def build_scheduler(optimizer: ChainedOptimizer, policy: Policy, num_updates: int) -> OptimizerParamScheduler:
    """Warm-up, then constant or decaying, counted in optimizer updates.

    It is stepped *before* each update, so that the first update already has a rate above 0.
    """
    cfg = policy.optimizer
    warmup = int(policy.scheduler.lr_warmup_fraction * num_updates)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=cfg.lr,
        min_lr=cfg.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(num_updates, warmup + 1),
        lr_decay_style=policy.scheduler.lr_decay_style,
        start_wd=cfg.weight_decay,
        end_wd=cfg.weight_decay,
        wd_incr_steps=num_updates,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
