"""What a GPU sends in one optimizer update, by kind of parallelism. Ring collectives, bytes one way."""

from __future__ import annotations

from nrt_megatron.plan.costs import Costs, Pass
from nrt_megatron.plan.training import gradient_bytes, recomputed_layers


def update_traffic(costs: Costs, micro_batch: Pass, num_micro_batches: int) -> dict[str, float]:
    """Bytes of a rank on the stage with the most layers.

    tensor: four exchanges a layer forward (two all-gathers, two reduce-scatters, or two all-reduces), four backward,
    four more where it is recomputed (Korthikanti et al. 2022, section 4.2.2). pipeline: hidden states of each chunk
    forward and their gradients back (Narayanan et al. 2021, section 3.2). context: keys and values gathered,
    backward again and their gradients scattered, and once more where attention is recomputed. data: reduce-scatter of
    fp32 gradients, all-gather of weights.
    """
    layout = costs.layout
    stage = max(layout.stages, key=lambda stage: stage.layers)
    tokens = micro_batch.sequences * micro_batch.tokens
    exchanges = 8 * stage.layers + 4 * recomputed_layers(costs, stage)
    attended_again = stage.layers if costs.cfg.recompute_granularity == "selective" else recomputed_layers(costs, stage)
    gathered = costs.context_exchange_bytes(tokens / layout.cp)
    transfers = 2 * layout.chunks if layout.pp > 1 else 0
    return {
        "tensor": num_micro_batches * exchanges * costs.tensor_exchange_bytes(tokens / layout.cp),
        "pipeline": num_micro_batches * transfers * costs.stage_transfer_bytes(tokens),
        "context": num_micro_batches * (3 * stage.layers + attended_again) * gathered,
        "data": max(sum(gradient_bytes(costs, stage)) for stage in layout.stages),
    }
