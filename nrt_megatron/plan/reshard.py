"""A rollout at a layout of its own: who holds what, and the move of the weights before each rollout.

Mirrors `mcore/rollout_model.py`: a replica that samples takes all of its weights from one replica of training, a layer
of each training stage at a time, and both sides are read once more for the checksum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nrt_megatron.plan import efficiency
from nrt_megatron.plan.costs import Costs
from nrt_megatron.plan.layout import Layout, Stage
from nrt_megatron.plan.parameters import layer_matrix, num_vocab_matrices, stage_parameters, vocab_matrix
from nrt_megatron.recipe import Recipe, has_rollout_layout, rollout_megatron

_CHECKED_BYTES = 32
"""Traffic to add an entry to a checksum, besides reading it: int64 written, read, multiplied and summed."""


def rollout_costs(recipe: Recipe, costs: Costs) -> Costs:
    """Costs where traces are drawn: of training's model, or of the rollout's own."""
    if not has_rollout_layout(recipe.policy):
        return replace(costs, layout=costs.layout.of_rollout())
    cfg = rollout_megatron(recipe.policy)
    moved = replace(recipe, policy=replace(recipe.policy, megatron_cfg=cfg))
    return Costs(costs.shape, cfg, Layout.of(moved, costs.shape, costs.layout.hardware))


def rollout_stages(training: Layout, rollout: Layout, stage: Stage) -> tuple[Stage, ...]:
    """The stages of the rollout that ranks of a training stage hold; ranks are dealt to stages in order in both."""
    first = stage.index * rollout.pp // training.pp
    end = -(-(stage.index + 1) * rollout.pp // training.pp)
    return rollout.stages[first:end]


def rollout_weights(drawing: Costs, stage: Stage, fp8: bool) -> float:
    """Bytes of a rank's own copy for the rollout; with FP8 copies of linear layers by rows, as a forward wants them."""
    parameters = stage_parameters(drawing.shape, drawing.cfg, drawing.layout, stage)
    quantised = stage.fp8_layers * layer_matrix(drawing.shape) / drawing.layout.tp if fp8 else 0
    return drawing.element * parameters + quantised


def arriving(costs: Costs, drawing: Costs, stage: Stage) -> float:
    """Bytes that wait on a rank at a time to be put in place: one layer of each training stage, or all outside them."""
    layers = min(stage.layers, costs.layout.pp) * layer_matrix(drawing.shape)
    outside = num_vocab_matrices(drawing.shape, stage) * vocab_matrix(drawing.shape, drawing.cfg)
    return drawing.element * max(layers, outside) / drawing.layout.tp


@dataclass(frozen=True)
class Move:
    """One move of all weights, on the rank that receives the most."""

    received: float = 0.0
    """Bytes over links; each rank sends as much."""
    seconds: float = 0.0


def move(costs: Costs, drawing: Costs) -> Move:
    """Weights from training's layout to the rollout's.

    At equal tensor-parallel sizes a rank has the part of its own stage already. Where they differ it may have a little
    of it, which is not counted.
    """
    training, rollout = costs.layout, drawing.layout
    parameters = [stage_parameters(drawing.shape, drawing.cfg, rollout, stage) for stage in rollout.stages]
    whole = drawing.element * max(parameters)
    here = 1 / max(1, training.pp // rollout.pp) if training.tp == rollout.tp else 0.0
    received = whole * (1 - here)
    hardware = training.hardware
    near = training.gpus <= training.node
    rate = hardware.nvlink_gb_per_second if near else hardware.network_gb_per_second
    trained = max(stage_parameters(costs.shape, costs.cfg, training, stage) for stage in training.stages)
    checked = (drawing.element + _CHECKED_BYTES) * (max(parameters) + trained)
    seconds = received / (rate * 1e9 * efficiency.NETWORK) + drawing.memory_seconds(3 * whole + checked)
    return Move(received, seconds)
