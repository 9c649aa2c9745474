"""Seconds of one optimizer update: micro-batches through the pipeline, gradients over the ranks, optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from nrt_megatron.plan.costs import Costs, Pass, Seconds
from nrt_megatron.plan.layout import Stage
from nrt_megatron.plan.parameters import stage_parameters


@dataclass(frozen=True)
class Update:
    """One update, by cause. `work` is that of the slowest stage; the rest is what it waits for."""

    work: Seconds
    pipeline_exchange: float
    bubble: float
    gradient_exchange: float
    optimizer: float

    @property
    def seconds(self) -> float:
        return sum(self.by_cause.values())

    @property
    def by_cause(self) -> dict[str, float]:
        """Seconds that add up to `seconds`."""
        rest = {name: value for name, value in vars(self).items() if name != "work"}
        return {**vars(self.work), **rest}

    @property
    def bubble_share(self) -> float:
        return self.bubble / self.seconds


def update_time(costs: Costs, micro_batch: Pass, num_micro_batches: int, *, chunked_loss: bool) -> Update:
    """One update of `num_micro_batches` equal micro-batches a data-parallel rank.

    1F1B, interleaved where there are chunks (Narayanan et al. 2021, arXiv 2104.04473, section 2.2): every stage waits
    for the slowest one, and filling and draining the pipeline costs one pass of a chunk on each other stage. Transfers
    between stages hide behind other chunks' work when interleaved (Megatron-LM's default) and are waited for otherwise.
    """
    layout, chunks = costs.layout, costs.layout.chunks
    forward = [stage_pass(costs, stage, micro_batch, chunked=chunked_loss) for stage in layout.stages]
    backward = [stage_pass(costs, stage, micro_batch, chunked=chunked_loss, backward=True) for stage in layout.stages]
    times = [f + b for f, b in zip(forward, backward)]
    slowest = max(times, key=lambda time: time.total)
    exchange = 0.0
    if layout.pp > 1:
        tokens = micro_batch.sequences * micro_batch.tokens
        transfer = costs.stage_transfer_bytes(tokens) / layout.pipeline_bandwidth
        hidden = [min(f.total for f in forward) / chunks, min(b.total for b in backward) / chunks]
        exchange = chunks * sum(max(0.0, transfer - h) for h in hidden) if chunks > 1 else 2 * transfer
    others = sum(time.total for time in times) - slowest.total + (layout.pp - 1) * exchange
    exchanges = [_gradients(costs, s, f.total, b.total) for s, f, b in zip(layout.stages, forward, backward)]
    return Update(
        work=slowest * num_micro_batches,
        pipeline_exchange=exchange * num_micro_batches,
        bubble=others / chunks,
        gradient_exchange=max(exchanges),
        optimizer=max(_optimizer(costs, stage) for stage in layout.stages),
    )


def forward_time(costs: Costs, micro_batch: Pass, num_micro_batches: int) -> float:
    """Seconds of forward passes alone through the pipeline: log-probs of sequences without gradients."""
    times = [stage_pass(costs, stage, micro_batch, chunked=True).total for stage in costs.layout.stages]
    return num_micro_batches * max(times) + (sum(times) - max(times)) / costs.layout.chunks


def stage_pass(costs: Costs, stage: Stage, work: Pass, *, chunked: bool, backward: bool = False) -> Seconds:
    """One micro-batch through a stage in one direction; recomputed layers run forward again first."""
    plain = stage.layers - stage.fp8_layers
    time = (
        costs.layer(work, backward=backward) * plain + costs.layer(work, fp8=True, backward=backward) * stage.fp8_layers
    )
    if backward:
        time += _recomputation(costs, stage, work)
    if stage.last:
        time += costs.output_layer(work.num_scored / costs.layout.cp, backward=backward, chunked=chunked)
    return time


def recomputed_layers(costs: Costs, stage: Stage) -> int:
    """Layers of the stage whose forward pass runs twice; `block` counts them for each chunk."""
    cfg = costs.cfg
    if cfg.recompute_granularity != "full":
        return 0
    if cfg.recompute_method == "uniform":
        return stage.layers
    return min(stage.layers, cfg.recompute_num_layers * costs.layout.chunks)


def _recomputation(costs: Costs, stage: Stage, work: Pass) -> Seconds:
    if costs.cfg.recompute_granularity == "selective":
        layer = costs.layer(work)
        return Seconds(attention=layer.attention, context_exchange=layer.context_exchange) * stage.layers
    again = recomputed_layers(costs, stage)
    fp8 = min(again, stage.fp8_layers)
    return costs.layer(work) * (again - fp8) + costs.layer(work, fp8=True) * fp8


def gradient_bytes(costs: Costs, stage: Stage) -> tuple[float, float]:
    """What a rank sends for its fp32 gradients and for its updated weights: ring reduce-scatter and all-gather.

    Without the distributed optimizer gradients are all-reduced, which is both in fp32.
    """
    shards = costs.layout.shards
    parameters = stage_parameters(costs.shape, costs.cfg, costs.layout, stage) * (shards - 1) / shards
    return 4.0 * parameters, (costs.element if costs.cfg.use_distributed_optimizer else 4.0) * parameters


def _gradients(costs: Costs, stage: Stage, forward: float, backward: float) -> float:
    """Exposed seconds; overlapped exchanges hide behind one micro-batch, save for one layer's share."""
    cfg, rate = costs.cfg, costs.layout.data_bandwidth
    reduce, gather = (sent / rate for sent in gradient_bytes(costs, stage))
    share = 1 / max(1, stage.layers)
    if not cfg.use_distributed_optimizer:
        reduce, gather = reduce + gather, 0.0
    if cfg.overlap_grad_reduce:
        reduce = max(reduce - backward, reduce * share)
    if cfg.overlap_param_gather:
        gather = max(gather - forward, gather * share)
    return reduce + gather


def _optimizer(costs: Costs, stage: Stage) -> float:
    """Adam reads gradient, master weight and two moments and writes three, all fp32, and the weight; once more each
    gradient is read for the norm and each sum is zeroed."""
    parameters = stage_parameters(costs.shape, costs.cfg, costs.layout, stage)
    shard = parameters / costs.layout.shards if costs.cfg.use_distributed_optimizer else parameters
    traffic = shard * (7 * 4 + costs.element + 4) + parameters * 4
    return costs.memory_seconds(traffic)
