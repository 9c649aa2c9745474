"""Context parallelism: the ranks of a group share each sequence of a micro-batch.

A sequence is cut into 2 * CP chunks of which rank r has the r-th from the front and the r-th from the back, Megatron's
way of giving every rank the same work under a causal mask (`megatron.core.utils.get_batch_on_this_cp_rank`). Layers see
a rank's own tokens; attention has its own queries and gathers keys and values of the whole sequence (A. Grattafiori et
al., The Llama 3 Herd of Models, 2024, section 3.3.2), which leaves it free to take any mask. The loss is that of whole
sequences: log-probs of all ranks are put together, and each rank's gradient is that of the tokens it scored.

In a rollout sequences are whole: the ranks of a group share the prompts instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor
from torch.distributed import ProcessGroup

from nrt_megatron.data.batch import MicroBatch
from nrt_megatron.data.traces import Generator
from nrt_megatron.mcore.exchange import SharingGenerator


@dataclass(frozen=True)
class Share:
    """What this rank feeds of a micro-batch [b, s], and which of its n scored tokens it predicts."""

    tokens: Tensor
    """int64 [b, s / cp]"""
    position_ids: Tensor
    """int64 [b, s / cp]"""
    branches: Optional[Tensor]
    """int64 [b, s / cp], as in `MicroBatch`"""
    scored: Optional[Tensor]
    """int64 [m]: index among the n scored tokens; None: all, there is one rank"""
    sources: Tensor
    """int64 [m]: `column * b + row` of the positions that predict them, columns being this rank's"""


def share_of(batch: MicroBatch) -> Share:
    """This rank's part of a micro-batch whose width is a multiple of 2 * CP."""
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return Share(batch.tokens, batch.position_ids, batch.branches, None, batch.sources)
    b, s = batch.tokens.shape
    chunk_size, rest = divmod(s, 2 * group.size())
    assert not rest, f"{s} columns are not 2 x {group.size()} equal chunks"
    grids = {"tokens": batch.tokens, "position_ids": batch.position_ids, "branches": batch.branches}
    mine = get_batch_on_this_cp_rank(grids, cp_group=group)
    column, row = batch.sources // b, batch.sources % b
    chunk, offset = column // chunk_size, column % chunk_size
    first, second = chunks_of(group)
    scored = ((chunk == first) | (chunk == second)).nonzero()[:, 0]
    own_column = torch.where(chunk == first, offset, offset + chunk_size)
    return Share(**mine, scored=scored, sources=(own_column * b + row)[scored])


def chunks_of(group: ProcessGroup) -> tuple[int, int]:
    """The two chunks of this rank, of 2 * CP in the order of the sequence."""
    return group.rank(), 2 * group.size() - 1 - group.rank()


def of_all_ranks(scores: Tensor, share: Share, num_scored: int) -> Tensor:
    """Scores [k, m] of each rank's tokens as [k, num_scored] on every rank.

    Backward every rank takes the gradient of its own: what is computed of the result must be the same on all ranks.
    """
    if share.scored is None:
        return scores
    own = scores.new_zeros(len(scores), num_scored).index_copy(1, share.scored, scores)
    return reduce_from_tensor_model_parallel_region(own, group=parallel_state.get_context_parallel_group())


def whole(own: Tensor, group: ProcessGroup) -> Tensor:
    """A rank's two chunks [s / cp, ...] to the sequence [s, ...]; backward the gradients of all ranks are summed."""
    gathered = gather_from_sequence_parallel_region(own, group=group)
    ranks = gathered.unflatten(0, (group.size(), 2, -1))  # chunk r and chunk 2 * cp - 1 - r of rank r
    return torch.cat([ranks[:, 0], ranks[:, 1].flip(0)]).flatten(0, 1)


def with_whole(own: Tensor, group: ProcessGroup, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """`attend(whole(own))`, of which autograd keeps a rank's own part: the whole is gathered again on the way back.

    Gathered at one place of that way, on every rank: how often kernels ask for what they saved may differ by rank.
    """
    if not torch.is_grad_enabled():
        return attend(whole(own, group))
    kept = _Kept(own.detach(), group)
    joined = _Released.apply(whole(own, group), kept)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack(joined), kept.unpack):
        out = attend(joined)
    return _Fetched.apply(out, kept)


class _Kept:
    """A rank's part of a tensor, in place of the whole that kernels save; views of it are kept as their geometry."""

    def __init__(self, own: Tensor, group: ProcessGroup):
        self.own, self.group = own, group
        self.joined: Optional[Tensor] = None

    def pack(self, joined: Tensor) -> Callable[[Tensor], Any]:
        storage = joined.untyped_storage().data_ptr()  # alive as long as anything is packed

        def pack(saved: Tensor) -> Any:
            if saved.untyped_storage().data_ptr() != storage:
                return saved
            return saved.size(), saved.stride(), saved.storage_offset()

        return pack

    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        assert self.joined is not None, "the backward pass begins with the output of attention"
        return self.joined.as_strided(*packed)


class _Fetched(torch.autograd.Function):
    """The identity on attention's output; backward, before attention's own, gathers what it was computed from."""

    @staticmethod
    def forward(ctx, out, kept):
        ctx.kept = kept
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        ctx.kept.joined = whole(ctx.kept.own, ctx.kept.group)
        return grad, None


class _Released(torch.autograd.Function):
    """The identity on what was gathered; backward, after attention's, lets it go."""

    @staticmethod
    def forward(ctx, joined, kept):
        ctx.kept = kept
        return joined.view_as(joined)

    @staticmethod
    def backward(ctx, grad):
        ctx.kept.joined = None
        return grad, None


def sharing(generator: Generator) -> Generator:
    """`generator` asked for a part of the prompts by each context-parallel rank, and for all of them by all together.

    Also what keeps these ranks at the same tokens: each of them trains on its part of every trace.
    """
    group = parallel_state.get_context_parallel_group()
    return SharingGenerator(generator, group) if group.size() > 1 else generator
