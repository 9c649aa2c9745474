"""Log-probs and entropies of chosen tokens from hidden states, without ever holding the logits.

The output layer, the vocabulary-parallel softmax and their gradients are one autograd function that works
through the tokens in chunks: forward keeps two numbers a token, backward computes each chunk's logits again.
Peak workspace is `chunk_size * vocab / tensor_parallel_size` floats instead of `tokens * vocab`.

Megatron's `vocab_parallel_cross_entropy` needs the [tokens, vocab / tp] logits as input and keeps their
softmax for the backward, which is the memory that long reasoning traces do not leave; and it has no entropy.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def _chunk_logits(hidden: Tensor, weight: Tensor, scale: Tensor, padding: int) -> Tensor:
    """fp32 (or wider) logits [c, v] of one chunk on this rank's vocabulary shard; padded rows are -inf."""
    logits = torch.nn.functional.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale[:, None]
    if padding:
        logits[:, -padding:] = -torch.inf
    return logits


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, scale, vocab_start, padding, group, chunk_size):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        log_probs, entropies, log_norms = (torch.empty(len(targets), dtype=dtype, device=hidden.device) for _ in range(3))
        for chunk in torch.arange(len(targets), device="cpu").split(chunk_size):
            c = slice(int(chunk[0]), int(chunk[-1]) + 1)
            logits = _chunk_logits(hidden[c], weight, scale[c], padding)  # [c, v]
            peak = logits.amax(dim=-1)  # [c]
            dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
            logits -= peak[:, None]
            local = targets[c] - vocab_start
            mine = (local >= 0) & (local < logits.size(1))
            picked = logits.gather(1, local.clamp(0, logits.size(1) - 1)[:, None])[:, 0]
            target_logit = torch.where(mine, picked, 0.0)
            weights = logits.exp()
            # The mean logit under softmax gives the entropy; -inf rows have weight 0 and must not give 0 * inf.
            logits.nan_to_num_(neginf=0.0) if padding else None
            sums = torch.stack([weights.sum(-1), (weights * logits).sum(-1), target_logit])  # [3, c]
            dist.all_reduce(sums, group=group)
            log_norm = sums[0].log()
            log_probs[c] = sums[2] - log_norm
            entropies[c] = log_norm - sums[1] / sums[0]
            log_norms[c] = log_norm + peak
        ctx.save_for_backward(hidden, weight, targets, scale, log_norms, entropies)
        ctx.vocab_start, ctx.padding, ctx.group, ctx.chunk_size = vocab_start, padding, group, chunk_size
        return log_probs, entropies

    @staticmethod
    def backward(ctx, grad_log_probs, grad_entropies):
        hidden, weight, targets, scale, log_norms, entropies = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for chunk in torch.arange(len(targets), device="cpu").split(ctx.chunk_size):
            c = slice(int(chunk[0]), int(chunk[-1]) + 1)
            log_p = _chunk_logits(hidden[c], weight, scale[c], ctx.padding) - log_norms[c, None]  # [c, v]
            p = log_p.exp()
            # d logp_t / d logit_j = [j = t] - p_j;  d entropy / d logit_j = -p_j (log p_j + entropy)
            grad = -grad_log_probs[c, None] * p
            if ctx.padding:
                log_p.nan_to_num_(neginf=0.0)
            grad -= grad_entropies[c, None] * p * (log_p + entropies[c, None])
            local = targets[c] - ctx.vocab_start
            mine = (local >= 0) & (local < p.size(1))
            grad.scatter_add_(
                1, local.clamp(0, p.size(1) - 1)[:, None], torch.where(mine, grad_log_probs[c], 0.0)[:, None]
            )
            grad = (grad * scale[c, None]).to(hidden.dtype)
            grad_hidden[c] = grad @ weight
            grad_weight += grad.t() @ hidden[c]
        dist.all_reduce(grad_hidden, group=ctx.group)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None, None


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup,
    chunk_size: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of its distribution, softmax over the whole vocabulary.

    hidden [n, h]: final hidden state that predicts each target, the same on all ranks of `group`.
    weight [padded_vocab / tp, h]: this rank's rows of the output layer. targets int64 [n]. scale [n]:
    inverse temperature of each token's logits. vocab_size: unpadded; rows beyond it have probability 0.
    Returns (log_probs [n], entropies [n]) in at least fp32. Gradients flow to hidden and weight.
    """
    shard, rank = weight.size(0), dist.get_rank(group)
    start = shard * rank
    padding = min(max(start + shard - vocab_size, 0), shard)
    if not len(targets):
        nothing = (hidden.sum() + weight.sum()) * 0.0  # keeps the graph, so that every rank's backward runs
        return hidden.new_zeros(0) + nothing, hidden.new_zeros(0) + nothing
    return _ChunkedLogProbs.apply(hidden, weight, targets, scale, start, padding, group, chunk_size)
