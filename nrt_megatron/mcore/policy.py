"""The policy a run trains: model chunks, optimizer and schedule, and one update on a mini-batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from nrt_megatron.convert.config import ModelShape
from nrt_megatron.convert.vocabulary import NewTokens
from nrt_megatron.data.batch import MicroBatch
from nrt_megatron.mcore import pipeline
from nrt_megatron.mcore.hf import WeightSource, load_hf_weights
from nrt_megatron.mcore.model import PolicyModel, build_chunks, use_transformer_engine, wrap_for_training
from nrt_megatron.mcore.optim import GuardedOptimizer, build_optimizer, build_scheduler
from nrt_megatron.mcore.precision import describe
from nrt_megatron.mcore.runtime import Runtime
from nrt_megatron.mcore.stopwatch import Stopwatch
from nrt_megatron.recipe import Policy as PolicyRecipe
from nrt_megatron.recipe import token_multiple


@dataclass(frozen=True)
class Update:
    """One optimizer update; `results` only on the last pipeline stage."""

    results: list[pipeline.MicroBatchResult]
    grad_norm: float
    lr: float
    applied: bool
    """False when loss or gradient was not finite, and weights and optimizer stayed as they were."""


class MegatronPolicy:
    """Weights, optimizer and schedule on one rank."""

    def __init__(self, runtime: Runtime, recipe: PolicyRecipe, shape: ModelShape, num_updates: int):
        self.runtime, self.recipe, self.shape = runtime, recipe, shape
        self.chunks: list[PolicyModel] = build_chunks(shape, recipe.megatron_cfg)
        self.num_updates = num_updates
        self.ddp: list[DistributedDataParallel] = []
        self.skipped_in_a_row = 0
        """Updates since the last one that was applied."""
        self.version = 0
        """Changes with the weights: updates of this process that were applied, and checkpoints loaded."""
        self.forwards = Stopwatch()
        """Of the forward passes of updates."""
        self.optimizer: GuardedOptimizer
        self.scheduler: OptimizerParamScheduler

    @property
    def pad_multiple(self) -> int:
        """Columns of a micro-batch must be a multiple of this."""
        return token_multiple(self.recipe)

    @property
    def layers(self) -> str:
        """Which layers run, for the user."""
        cfg = self.recipe.megatron_cfg
        kind = "Transformer Engine" if use_transformer_engine(cfg) else "Megatron local"
        return f"{kind} layers, {describe(cfg)}"

    def load(self, source: WeightSource, shape: ModelShape, new_tokens: NewTokens | None = None) -> None:
        """Fills the weights from Hugging Face tensors of `shape`, each rank its own slices.

        To be called once, before `prepare_for_training`: the optimizer copies the weights it finds.
        """
        load_hf_weights(
            self.chunks, shape, source, self.runtime.tp_rank, self.runtime.tp_size, new_token_init=new_tokens
        )

    def prepare_for_training(self) -> None:
        """Wraps the filled model for data parallelism and builds optimizer and schedule."""
        self.ddp = wrap_for_training(self.chunks, self.recipe.megatron_cfg)
        self.optimizer = build_optimizer(self.ddp, self.recipe)
        self.scheduler = build_scheduler(self.optimizer, self.recipe, self.num_updates)
        for chunk in self._overlapping:
            chunk.disable_forward_pre_hook(param_sync=True)

    @property
    def _overlapping(self) -> list[DistributedDataParallel]:
        """Chunks whose weights, after an update, the next forward's hooks gather while it runs."""
        return self.ddp if self.recipe.megatron_cfg.overlap_param_gather else []

    @contextlib.contextmanager
    def _gathering(self) -> Iterator[None]:
        """Inside, forwards gather weights. Elsewhere none is left to gather, and a rollout, which not all data-parallel
        ranks need run alike, neither waits in a hook of every module for every token nor meets other ranks in one.
        """
        for chunk in self._overlapping:
            chunk.enable_forward_pre_hook()
        try:
            yield
        finally:
            for chunk in self._overlapping:
                chunk.disable_forward_pre_hook(param_sync=False)

    def update(self, batches: list[MicroBatch], loss_fn: pipeline.LossFunction) -> Update:
        """Forward and backward over this rank's micro-batches of one mini-batch, then one optimizer step.

        Every data-parallel rank passes the same number of micro-batches of the same size.
        """
        results = self.gradients(batches, loss_fn)
        self.scheduler.step(1)
        applied, _, _ = self.optimizer.step()
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        self.version += applied
        return Update(
            results=results,
            grad_norm=self.optimizer.grad_norm,
            lr=self.optimizer.param_groups[0]["lr"],
            applied=applied,
        )

    def gradients(self, batches: list[MicroBatch], loss_fn: pipeline.LossFunction) -> list[pipeline.MicroBatchResult]:
        """Forward and backward alone: every parameter's `main_grad` is that of the global mini-batch."""
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        with self._gathering():
            return pipeline.run(self.ddp, batches, loss_fn, device=self.runtime.device, stopwatch=self.forwards)

    def grad_norm(self) -> float:
        """Norm of the gradients that are there, before clipping. Collective."""
        self.optimizer.prepare_grads()
        return self.optimizer.grad_norm

    def gather_weights(self) -> None:
        """Makes the weights whole on every data-parallel rank. Collective; to be called after the updates of a step.

        With `overlap_param_gather` an update leaves that to the next forward, and a checkpoint would be saved without.
        """
        for chunk in self._overlapping:
            chunk.start_param_sync(force_sync=True)

    def with_own_log_probs(self, batches: list[MicroBatch]) -> list[MicroBatch]:
        """The batches with this policy's log-probs as the old ones, and the sampler's beside them.

        On the last pipeline stage, which alone computes a loss; elsewhere unchanged.
        """
        results = self.log_probs(batches)
        return (
            [
                replace(batch, old_log_probs=result.log_probs, sampler_log_probs=batch.old_log_probs)
                for batch, result in zip(batches, results, strict=True)
            ]
            if results
            else batches
        )

    @torch.no_grad()
    def log_probs(self, batches: list[MicroBatch]) -> list[pipeline.MicroBatchResult]:
        """Log-probs and entropies of the scored tokens by a full forward; on the last stage only."""
        measured = {"device": self.runtime.device, "stopwatch": self.forwards}
        with self._gathering():
            return pipeline.run(self.ddp, batches, None, **measured, forward_only=True)
