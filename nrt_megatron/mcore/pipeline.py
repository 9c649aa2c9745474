"""The only caller of Megatron's forward-backward schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nrt_megatron.data.batch import MicroBatch
from nrt_megatron.mcore.attention import additive, forget_windows, hidden_columns, window_of
from nrt_megatron.mcore.context import Share, of_all_ranks, share_of
from nrt_megatron.mcore.model import ScoredTokens, unwrap
from nrt_megatron.mcore.stopwatch import Stopwatch
from nrt_megatron.objective.loss import LossOutput, TokenBatch

LossFunction = Callable[[TokenBatch], LossOutput]


@dataclass(frozen=True)
class MicroBatchResult:
    """What the last stage keeps of one micro-batch; log_probs and entropy are detached, float32 [n]."""

    num_sequences: int
    log_probs: Tensor
    entropy: Tensor
    loss: LossOutput | None
    """None in a forward without a loss; its tensors are detached."""


class _Underway:
    """A micro-batch on its way through the model chunks of this rank, which share its mask."""

    def __init__(self, batch: MicroBatch, num_chunks: int) -> None:
        self.batch, self.share = batch, share_of(batch)
        self._chunks_left = num_chunks
        self._mask: Tensor | None = None

    def mask(self, config: TransformerConfig) -> Tensor | None:
        """Of what this rank's tokens may see of all, to be asked for once by each chunk; None where attention is causal
        along the row, which the core attention does without one.

        Made for the first chunk. From the last one on nobody but autograd holds it.
        """
        mask = _mask(self.batch, self.share, config) if self._mask is None else self._mask
        self._chunks_left -= 1
        self._mask = mask if self._chunks_left else None
        return mask


def _mask(batch: MicroBatch, share: Share, config: TransformerConfig) -> Tensor | None:
    if batch.branches is None:
        return None
    window, exists = window_of(config), batch.branches >= 0
    hidden = hidden_columns(share.position_ids, batch.position_ids, exists, window, batch.branches, share.branches)
    return additive(hidden, config.params_dtype)


def _forward_step(loss_fn: LossFunction | None):
    """Megatron's `forward_step_func`: model output, and the function that makes (sum, count, log) of it.

    Context-parallel ranks compute the same loss, of whole sequences; one of them counts the sequences.
    """

    def step(batches: Iterator[_Underway], model: torch.nn.Module):
        underway = next(batches)
        batch, share = underway.batch, underway.share
        scored = slice(None) if share.scored is None else share.scored
        output = model(
            share.tokens,
            share.position_ids,
            underway.mask(unwrap(model).config),
            labels=ScoredTokens(share.sources, batch.targets[scored], batch.scale[scored]),
            shared_rows=batch.branches is None,
        )

        def reduce(output: Tensor) -> tuple[Tensor, Tensor, MicroBatchResult]:
            log_probs, entropy = of_all_ranks(output, share, len(batch.targets))
            counted = batch.num_sequences if parallel_state.get_context_parallel_rank() == 0 else 0
            count = output.new_full((), counted, dtype=torch.int)  # filled there: a copy would wait for the GPU
            result = MicroBatchResult(batch.num_sequences, log_probs.detach(), entropy.detach(), None)
            if loss_fn is None:
                return log_probs.sum(), count, result
            loss = loss_fn(
                TokenBatch(
                    log_probs=log_probs,
                    old_log_probs=batch.old_log_probs,
                    advantages=batch.advantages,
                    token_signal=batch.token_signal,
                    kind=batch.kind,
                    sequence=batch.sequence,
                    num_sequences=batch.num_sequences,
                    entropy=entropy.detach(),
                    sampler_log_probs=batch.sampler_log_probs,
                )
            )
            # The gradient of a loss that is not finite may well be; made NaN, it reaches all ranks with the gradient.
            finite = loss.loss_sum.detach().isfinite()
            return loss.loss_sum * torch.where(finite, 1.0, torch.nan), count, replace(result, loss=loss.detached())

        return output, reduce

    return step


def run(
    chunks: list[DistributedDataParallel],
    batches: list[MicroBatch],
    loss_fn: LossFunction | None,
    *,
    device: torch.device,
    stopwatch: Stopwatch,
    forward_only: bool = False,
) -> list[MicroBatchResult]:
    """Runs all micro-batches through the pipeline; gradients end up reduced and divided by the number of
    sequences of the global batch.

    Every rank passes the same number of micro-batches. Returns one result per micro-batch on the last stage,
    in order, and an empty list elsewhere. With `forward_only` (loss_fn may be None) no gradient is computed.
    """
    config = unwrap(chunks[0]).config
    config.finalize_model_grads_func = finalize_model_grads
    # Gradients are exchanged (`overlap_grad_reduce`) in the last micro-batch's backward pass alone.
    config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    # Shares are cut before a stage could wait for another one.
    underway = [_Underway(batch.to(device), len(chunks)) for batch in batches]
    iterators = [iter(underway) for _ in chunks]
    try:
        return get_forward_backward_func()(
            forward_step_func=stopwatch.measuring(_forward_step(loss_fn)),
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(batches),
            seq_length=max(b.tokens.size(1) for b in batches),
            micro_batch_size=batches[0].tokens.size(0),
            forward_only=forward_only,
        )
    finally:
        forget_windows()
