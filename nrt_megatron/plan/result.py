"""What a plan says. Plain data: the text and the JSON of `nrt plan` are made from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class StagePlan:
    """One rank of a pipeline stage."""

    layers: int
    parameters: int
    weights_gib: float
    gradients_gib: float
    optimizer_gib: float
    activations_gib: float
    """Of the update, kept between forward and backward."""
    kv_cache_gib: float
    """Of the rollout; not there during the update."""
    workspace_gib: float
    """Of the phase that takes more: log-probs, prefill, drawing, a layer's gradients."""
    total_gib: float
    """Peak of a step: weights, gradients, optimizer and the phase that takes more."""
    rollout_weights_gib: float = 0.0
    """Of a rollout with a layout of its own, which stay as well."""


@dataclass(frozen=True)
class Phase:
    """A phase of a step, over all GPUs; zeros where there is none."""

    seconds: float = 0.0
    tokens: float = 0.0
    """Sampled (rollout), scored (scoring), trained on (update)."""
    flops: float = 0.0
    """The model's: forward and backward, causal attention, nothing that is computed again."""
    tokens_per_second_per_gpu: float = 0.0
    tflops_per_gpu: float = 0.0

    @classmethod
    def of(cls, seconds: float, tokens: float, flops: float, gpus: int) -> Phase:
        return cls(seconds, tokens, flops, tokens / seconds / gpus, flops / seconds / gpus / 1e12)


@dataclass(frozen=True)
class Plan:
    """A step of a recipe on a kind of GPU."""

    recipe: str
    hardware: str
    memory_gib: float
    """Of one GPU, less what is reserved."""
    gpus: int
    layout: dict[str, int]
    training_only: bool
    tokens_per_sequence: dict[str, float]
    """Averages that the times are for; memory is for the recipe's limits."""
    stages: list[StagePlan]
    fits: bool
    rollout: Phase
    scoring: Phase
    update: Phase
    """All updates of a step."""
    num_updates: int
    update_seconds: dict[str, float]
    """One update, by cause: what the slowest stage does, and what it waits for."""
    pipeline_bubble: float
    """Share of an update in which the slowest stage waits for the pipeline to fill and drain."""
    traffic_gib: dict[str, float]
    """What one GPU sends in one update, by kind of parallelism."""
    step_seconds: float
    num_steps: int
    run_gpu_hours: float
    rollout_layout: dict[str, int] | None = None
    """Where the rollout has a layout of its own."""
    rollout_parameters: list[int] = field(default_factory=list)
    """On one rank of each of its stages."""
    reshard_gib: float = 0.0
    """What one GPU receives, and sends, of the weights before a rollout with a layout of its own."""
    reshard_seconds: float = 0.0
    """Part of `step_seconds`: that move, and the check of what arrived."""
    first_change: str | None = None
    """What to try first where it does not fit."""

    @property
    def peak_gib(self) -> float:
        return max(stage.total_gib for stage in self.stages)

    def as_json(self) -> dict[str, Any]:
        """Every field under its own name."""
        return asdict(self)
