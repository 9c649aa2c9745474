"""Log-probs and entropies of chosen tokens from hidden states, without ever holding the logits.

The output layer, the vocabulary-parallel softmax and their gradients are one autograd function that works
through the tokens in chunks: forward keeps two numbers a token, backward computes each chunk's logits again.
Peak workspace is two buffers of `chunk_size * vocab / tensor_parallel_size` floats instead of several of
`tokens * vocab`; `tools/measure_logprobs.py` measures it.

Megatron's `vocab_parallel_cross_entropy` needs the [tokens, vocab / tp] logits as input and keeps their
softmax for the backward, which is the memory that long reasoning traces do not leave; and it has no entropy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class _Shard:
    """This rank's part of the vocabulary, and how to work through the tokens."""

    start: int
    """First token id of the shard."""
    padding: int
    """Rows at the shard's end that stand for no token."""
    group: dist.ProcessGroup
    chunk_size: int

    def chunks(self, num_tokens: int) -> list[slice]:
        starts = range(0, num_tokens, self.chunk_size)
        return [slice(first, min(first + self.chunk_size, num_tokens)) for first in starts]

    def logits(self, hidden: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """Logits [c, v] in at least fp32; padded rows are -inf."""
        logits = torch.nn.functional.linear(hidden, weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).mul_(scale[:, None])
        if self.padding:
            logits[:, -self.padding :] = -torch.inf
        return logits

    def locate(self, targets: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """(whether this shard holds each target, its column here or 0), both [c]."""
        local = targets - self.start
        mine = (local >= 0) & (local < width)
        return mine, torch.where(mine, local, 0)

    # The two functions below hold [c, v] buffers; they return before the next chunk allocates its own.

    def statistics(self, hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """Log-prob of the targets, entropy, and log of the normaliser, each [c]."""
        logits = self.logits(hidden, weight, scale)
        peak = logits.amax(dim=-1)  # [c]
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=self.group)
        logits -= peak[:, None]
        mine, column = self.locate(targets, logits.size(1))
        target_logit = torch.where(mine, logits.gather(1, column[:, None])[:, 0], 0.0)
        weights = logits.exp()
        if self.padding:
            logits[:, -self.padding :] = 0.0  # their weight is 0, and 0 * -inf must not be
        # The mean logit under the softmax gives the entropy.
        sums = torch.stack([weights.sum(-1), logits.mul_(weights).sum(-1), target_logit])  # [3, c]
        dist.all_reduce(sums, group=self.group)
        log_norm = sums[0].log()
        return sums[2] - log_norm, log_norm - sums[1] / sums[0], log_norm + peak

    def logit_gradient(
        self,
        logits: Tensor,
        targets: Tensor,
        log_norm: Tensor,
        entropy: Tensor,
        grad_log_prob: Tensor,
        grad_entropy: Tensor,
    ) -> Tensor:
        """d logp_t / d logit_j = [j = t] - p_j; d entropy / d logit_j = -p_j (log p_j + entropy). In place, [c, v]."""
        log_p = logits.sub_(log_norm[:, None])
        p = log_p.exp()
        if self.padding:
            log_p[:, -self.padding :] = 0.0
        grad = log_p.add_(entropy[:, None]).mul_(grad_entropy[:, None]).add_(grad_log_prob[:, None]).mul_(p).neg_()
        mine, column = self.locate(targets, p.size(1))
        return grad.scatter_add_(1, column[:, None], torch.where(mine, grad_log_prob, 0.0)[:, None])


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, scale, shard: _Shard):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        out = torch.empty(3, len(targets), dtype=dtype, device=hidden.device)
        for c in shard.chunks(len(targets)):
            out[:, c] = torch.stack(shard.statistics(hidden[c], weight, targets[c], scale[c]))
        log_probs, entropies, log_norms = out.unbind()
        ctx.save_for_backward(hidden, weight, targets, scale, log_norms, entropies)
        ctx.shard = shard
        return log_probs, entropies

    @staticmethod
    def backward(ctx, grad_log_probs, grad_entropies):
        hidden, weight, targets, scale, log_norms, entropies = ctx.saved_tensors
        shard: _Shard = ctx.shard
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))

        def add_chunk(c: slice) -> None:
            logits = shard.logits(hidden[c], weight, scale[c])
            grad = shard.logit_gradient(
                logits, targets[c], log_norms[c], entropies[c], grad_log_probs[c], grad_entropies[c]
            )
            grad = grad.mul_(scale[c, None]).to(hidden.dtype)
            grad_hidden[c] = grad @ weight
            grad_weight.add_(grad.t() @ hidden[c])

        for c in shard.chunks(len(targets)):
            add_chunk(c)
        dist.all_reduce(grad_hidden, group=shard.group)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup,
    chunk_size: int = 512,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of its distribution, softmax over the whole vocabulary.

    hidden [n, h]: final hidden state that predicts each target, the same on all ranks of `group`.
    weight [padded_vocab / tp, h]: this rank's rows of the output layer. targets int64 [n]. scale [n]:
    inverse temperature of each token's logits. vocab_size: unpadded; rows beyond it have probability 0.
    Returns (log_probs [n], entropies [n]) in at least fp32. Gradients flow to hidden and weight.
    """
    rows = weight.size(0)
    start = rows * dist.get_rank(group)
    padding = min(max(start + rows - vocab_size, 0), rows)
    if not len(targets):
        nothing = (hidden.sum() + weight.sum()) * 0.0  # keeps the graph, so that every rank's backward runs
        empty = hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32)) + nothing
        return empty, empty
    return _ChunkedLogProbs.apply(hidden, weight, targets, scale, _Shard(start, padding, group, chunk_size))
