"""Bytes on one rank of each stage, at the moment of a step when they are most.

Weights, gradients and optimizer state stay all the time, and so do the weights of a rollout with a layout of its own.
Activations belong to the update, the KV cache to the rollout, and each of the two phases has a workspace of its own:
they are not there at once, so the peak is what stays plus the larger phase. Lengths are the limits of the recipe, not
averages.
"""

from __future__ import annotations

from dataclasses import dataclass

from nrt_megatron.plan.costs import Costs, Pass
from nrt_megatron.plan.layout import Stage
from nrt_megatron.plan.parameters import layer_matrix, stage_parameters, vocab_matrix
from nrt_megatron.plan.reshard import arriving, rollout_stages, rollout_weights
from nrt_megatron.plan.rollout import RolloutBatch
from nrt_megatron.plan.training import recomputed_layers

GIB = 2**30


@dataclass(frozen=True)
class StageMemory:
    """Bytes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    kv_cache: float
    update_workspace: float
    rollout_workspace: float
    rollout_weights: float = 0.0
    arriving: float = 0.0

    @property
    def update(self) -> float:
        return self.activations + self.update_workspace

    @property
    def rollout(self) -> float:
        return self.kv_cache + self.rollout_workspace

    @property
    def workspace(self) -> float:
        """Of the phase that takes more."""
        return self.update_workspace if self.update >= self.rollout else self.rollout_workspace

    @property
    def total(self) -> float:
        staying = self.weights + self.gradients + self.optimizer + self.rollout_weights
        return staying + max(self.update, self.rollout, self.arriving)


def stage_memory(
    costs: Costs,
    stage: Stage,
    micro_batch: Pass,
    num_micro_batches: int,
    batch: RolloutBatch | None,
    drawing: Costs | None = None,
) -> StageMemory:
    """Peak of one rank of the stage. `batch`: the largest that is decoded together; None without a rollout.

    drawing: costs at the rollout's layout where it has one of its own.
    """
    cfg, layout, at = costs.cfg, costs.layout, drawing or costs
    in_fp8 = batch is not None and batch.fp8
    here = (stage,) if drawing is None else rollout_stages(layout, drawing.layout, stage)
    parameters = stage_parameters(costs.shape, cfg, layout, stage)
    optimizer = (12 if cfg.bf16 else 8) * parameters
    return StageMemory(
        weights=costs.element * parameters + _fp8_weights(costs, stage),
        gradients=4.0 * parameters,
        optimizer=optimizer / layout.shards if cfg.use_distributed_optimizer else optimizer,
        activations=_activations(costs, stage, micro_batch, num_micro_batches),
        kv_cache=0.0 if batch is None else max(batch.cache_bytes(at, held) for held in here),
        update_workspace=_update_workspace(costs, stage, micro_batch),
        rollout_workspace=0.0 if batch is None else max(batch.workspace_bytes(at, held) for held in here),
        rollout_weights=0.0 if drawing is None else max(rollout_weights(at, held, in_fp8) for held in here),
        arriving=0.0 if drawing is None else max(arriving(costs, at, held) for held in here),
    )


def _fp8_weights(costs: Costs, stage: Stage) -> float:
    """FP8 copies of the linear layers' weights, by rows and by columns; with `fp8_param` instead of the bf16 ones."""
    matrices = stage.fp8_layers * layer_matrix(costs.shape) / costs.layout.tp
    return matrices * (2 - costs.element if costs.cfg.fp8_param else 2)


def layer_activations(costs: Costs, *, fp8: bool = False, masked: bool = False) -> float:
    """Bytes a token that one layer keeps for its backward pass; Korthikanti et al. 2022, section 4, for SwiGLU.

    Kept in the activations' type: inputs of both norms, rotated queries and keys, values, the attention's output and
    what enters a fused SwiGLU. The inputs of the four linear maps are kept in FP8 where these run in it; else the
    attention's output is the projection's input. Fused attention keeps no scores, only an fp32 sum a head. The kernel
    for masks knows no grouped heads: it keeps keys and values once for each query head (`attention.ungrouped`), and
    those of whole sequences on context-parallel ranks.
    """
    shape, tp, split = costs.shape, costs.layout.tp, costs.layout.norm_split
    element, saved = costs.element, 1 if fp8 else costs.element
    heads, groups = shape.num_attention_heads * shape.kv_channels, shape.num_query_groups * shape.kv_channels
    if masked and groups < heads and costs.cfg.recompute_granularity != "selective":
        groups = heads * costs.layout.cp
    inner = element * (2 * heads + 2 * groups + 2 * shape.ffn_hidden_size) + 4 * shape.num_attention_heads
    inner += saved * (shape.ffn_hidden_size + (heads if fp8 else 0))
    return 2 * shape.hidden_size * (element + saved) / split + inner / tp


def in_flight(stage: int, num_stages: int, chunks: int, num_micro_batches: int) -> int:
    """Forward passes of a chunk that a stage has done before it first goes backward, that one included.

    1F1B: the stages behind it and itself. Interleaved (megatron.core.pipeline_parallel.schedules): two passes for each
    stage behind it, and all chunks but one for a round of micro-batches.
    """
    if chunks == 1:
        return min(num_micro_batches, num_stages - stage)
    return min(num_micro_batches * chunks, 2 * (num_stages - stage - 1) + (chunks - 1) * num_stages + 1)


def _activations(costs: Costs, stage: Stage, work: Pass, num_micro_batches: int) -> float:
    layout, cfg = costs.layout, costs.cfg
    tokens = work.sequences * work.tokens / layout.cp
    passes = in_flight(stage.index, layout.pp, layout.chunks, num_micro_batches) / layout.chunks
    fp8_share, masked = stage.fp8_layers / stage.layers if stage.layers else 0.0, costs.mask_columns(work) > 0
    layer = layer_activations(costs, fp8=True, masked=masked) * fp8_share
    layer += layer_activations(costs, masked=masked) * (1 - fp8_share)
    again = recomputed_layers(costs, stage)
    kept = layer * (stage.layers - again)
    if again:
        # A recomputed unit keeps its input; the unit that is being recomputed keeps everything once.
        unit = cfg.recompute_num_layers if cfg.recompute_method == "uniform" else 1
        kept += costs.element * costs.shape.hidden_size / layout.norm_split * again / unit
        layer_now = layer * min(unit, again)
    else:
        layer_now = 0.0
    last = (4 if stage.last else 0) * costs.element * costs.shape.hidden_size  # final norm, gathered and chosen
    return tokens * (kept * passes + layer_now + last) + _masks(costs, stage, work, num_micro_batches)


def _masks(costs: Costs, stage: Stage, work: Pass, num_micro_batches: int) -> float:
    """One of each micro-batch in flight, which all its layers share; without packing all its sequences, too."""
    layout = costs.layout
    # Passes are those of a round of micro-batches through each chunk in turn, then of the next round.
    passes = in_flight(stage.index, layout.pp, layout.chunks, num_micro_batches)
    rounds, begun = divmod(passes, layout.pp * layout.chunks)
    micro_batches = min(num_micro_batches, rounds * layout.pp + min(begun, layout.pp))
    mask = costs.element * work.tokens / layout.cp * costs.mask_columns(work)
    return micro_batches * mask * (work.sequences if work.packed else 1)


def _update_workspace(costs: Costs, stage: Stage, work: Pass) -> float:
    """The larger of a layer's gradients and the log-prob chunk of the last stage."""
    shape, cfg, layout = costs.shape, costs.cfg, costs.layout
    tokens = work.sequences * work.tokens / layout.cp
    layer = tokens * costs.element * (4 * shape.hidden_size + 5 * shape.ffn_hidden_size / layout.tp)
    if layout.cp > 1:  # keys and values of whole sequences, and their gradients
        width = 4 * shape.num_query_groups * shape.kv_channels / layout.tp
        layer += work.sequences * work.tokens * costs.element * width
    if not stage.last:
        return layer
    matrix = vocab_matrix(shape, cfg) / layout.tp
    # Two fp32 tensors of logits' shape in the backward pass, the fp32 weight gradient and its bf16 summand.
    chunk = 8 * min(cfg.logprob_chunk_size, tokens) * matrix / shape.hidden_size
    return max(layer, chunk + matrix * (4 + costs.element) + tokens * costs.element * shape.hidden_size)
