"""The NRT loss as sums over tokens (arXiv 2602.11549, gradient estimator; reductions as in the authors' code).

    loss = trace_loss_weight  * sum_trace  -A sg(clamp(rho, clip_min, clip_max)) log pi(z_t)   unless dropped
         + format_loss_weight * sum_forced_marker  -log pi(m)
         + token_loss_weight  * sum_answer  -s_i log pi(y*_i)

each divided by the constant `loss_normalizer`; nothing here divides by a number of sequences or tokens, so that
losses and gradients of any split into micro-batches add up to the same. The caller divides once by the number of
sequences of the global batch.

Where the sampler computes otherwise than the trainer (in another precision, say), a trace token is drawn from another
distribution than the one that rho starts from; with `TokenBatch.sampler_log_probs` its term is also multiplied by

    w = min(pi_old(z_t) / pi_sampler(z_t), rollout_importance_cap)

truncated importance sampling (E. L. Ionides, J. Comput. Graph. Stat. 17, 2008; for such samplers: F. Yao et al., Your
Efficient RL Framework Secretly Brings You Off-Policy RL Training, 2025).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Optional

import torch
from torch import Tensor

from nrt_megatron.objective.metrics import Metrics, Number, maximum_of, mean_of
from nrt_megatron.recipe import NRT

NONE, TRACE, FORMAT, ANSWER = 0, 1, 2, 3
"""`TokenBatch.kind`: no loss; sampled (also a marker the policy produced); forced marker; reference answer."""

LOSS_METRICS = (
    "loss/trace",
    "loss/format",
    "loss/token",
    "ratio/mean",
    "ratio/drop_share",
    "ratio/clip_share",
    "rollout_weight/mean",
    "rollout_weight/cap_share",
    "trace/entropy",
    "logprob_gap/abs_mean",
    "marker/format_nll",
    "answer/nll",
)
"""Names in `LossOutput.metrics`: always all of them, in this order."""

LOSS_MAXIMA = ("ratio/max", "logprob_gap/max")
"""Names in `LossOutput.maxima`: always both, in this order; -inf without trace tokens.

`logprob_gap`: |log pi_old - log pi_sampler| where both are known, else |log pi - log pi_old|, which is that gap in the
first update after a rollout.
"""


@dataclass(frozen=True)
class TokenBatch:
    """Tokens of some sequences, flat: every tensor is [n]. Only fields that a token's kind needs are ever read."""

    log_probs: Tensor
    """float, natural log, current policy; carries the gradient"""
    old_log_probs: Tensor
    """float, log-probs before the first update on these tokens: the sampler's, or the trainer's own"""
    advantages: Tensor
    """float, advantage A of the token's sequence"""
    token_signal: Tensor
    """float, s_i of answer tokens"""
    kind: Tensor
    """int64: NONE, TRACE, FORMAT or ANSWER"""
    sequence: Tensor
    """int64: index of the token's sequence, below num_sequences"""
    num_sequences: int
    entropy: Optional[Tensor] = None
    """float, entropy of the policy where the token was drawn (nats); only reported"""
    sampler_log_probs: Optional[Tensor] = None
    """float, the sampler's log-probs where `old_log_probs` are the trainer's: weighs the trace term; None: none"""


@dataclass(frozen=True)
class LossOutput:
    loss_sum: Tensor
    """Scalar with gradient: the weighted sum of `terms`."""
    terms: dict[str, Tensor]
    """`trace`, `format`, `token`: sums over tokens divided by `loss_normalizer`, before weights, with gradient."""
    counts: dict[str, Tensor]
    """Tokens that carry each term: dropped trace tokens are not among them."""
    metrics: Metrics
    """`LOSS_METRICS` -> (sum, count)"""
    maxima: dict[str, Number]
    """`LOSS_MAXIMA`"""

    def detached(self) -> LossOutput:
        """The same without gradients: what may outlive the backward pass."""
        terms = {name: term.detach() for name, term in self.terms.items()}
        return replace(self, loss_sum=self.loss_sum.detach(), terms=terms)


@dataclass(frozen=True)
class _Ratios:
    """Importance ratios of all tokens, detached; 1 outside the trace term."""

    ratio: Tensor
    """[n]: rho_t, or the sequence's r_k with `sequence_ratio`"""
    clamped: Tensor
    dropped: Tensor
    """bool [n]: trace tokens without a loss"""


def _ratios(batch: TokenBatch, in_trace: Tensor, settings: NRT) -> _Ratios:
    """Per-token ratios rho = exp(log pi - log pi_old), or one per sequence.

    With `sequence_ratio` the paper's importance ratio r_k = pi(z_k | x) / pi_old(z_k | x) replaces rho: the log-ratios
    of all trace-term tokens of a sequence are summed, and exp(sum) is clamped and tested for dropping like rho. The
    trace tokens of a sequence then have to be in one batch.
    """
    log_ratio = torch.where(in_trace, batch.log_probs.detach() - batch.old_log_probs, 0.0)
    if settings.sequence_ratio:
        total = log_ratio.new_zeros(batch.num_sequences).index_add(0, batch.sequence, log_ratio)
        log_ratio = total[batch.sequence]
    largest = math.log(torch.finfo(log_ratio.dtype).max) - 16  # finite, and sums of millions of such ratios as well
    ratio = log_ratio.clamp(-largest, largest).exp()
    dropped = ((batch.advantages > 0) & (ratio > settings.ratio_drop_max)) | (
        (batch.advantages < 0) & (ratio < settings.ratio_drop_min)
    )
    clamped = ratio.clamp(settings.ratio_clip_min, settings.ratio_clip_max)
    return _Ratios(ratio, clamped, dropped & in_trace)


def _rollout_weights(batch: TokenBatch, settings: NRT) -> Optional[Tensor]:
    """w of all tokens, detached; 1 for tokens that were not sampled. None: the sampler is the trainer."""
    if batch.sampler_log_probs is None:
        return None
    gap = torch.where(batch.kind == TRACE, batch.old_log_probs - batch.sampler_log_probs, 0.0)
    return gap.exp().clamp(max=settings.rollout_importance_cap)


def _sum(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum()


def nrt_loss(batch: TokenBatch, settings: NRT) -> LossOutput:
    """Trace, format and token terms of a micro-batch, as sums.

    Values of tokens that a term does not cover are selected away, never multiplied by 0: NaN or infinities there reach
    neither values nor gradients. A term without tokens is exactly 0 with gradient 0.

    - trace: TRACE tokens, and with `train_forced_marker` FORMAT tokens. A token is dropped when A > 0 and
      rho > ratio_drop_max, or A < 0 and rho < ratio_drop_min. With `sampler_log_probs` times w.
    - format: FORMAT tokens. token: ANSWER tokens, with s_i from `token_signal`, times r_k with `sequence_ratio`.
    - scheme `sft`: only the token term, with s_i = 1 and no ratio.
    """
    if settings.reward_scheme == "sft":
        batch = replace(
            batch,
            kind=torch.where(batch.kind == ANSWER, ANSWER, NONE),
            token_signal=torch.ones_like(batch.token_signal),
        )
        settings = replace(settings, sequence_ratio=False)
    is_format, is_answer = batch.kind == FORMAT, batch.kind == ANSWER
    in_trace = batch.kind == TRACE
    if settings.train_forced_marker:
        in_trace = in_trace | is_format
    ratios = _ratios(batch, in_trace, settings)
    # NONE tokens may hold anything: cut them out before any arithmetic touches the gradient's path.
    log_probs = torch.where(batch.kind == NONE, 0.0, batch.log_probs)
    signal = torch.where(is_answer, batch.token_signal, 0.0)
    advantages = torch.where(in_trace, batch.advantages, 0.0)
    weights = _rollout_weights(batch, settings)
    if weights is not None:
        advantages = advantages * weights
    if settings.sequence_ratio:
        signal = signal * ratios.clamped
    kept = in_trace & ~ratios.dropped
    masks = {"trace": kept, "format": is_format, "token": is_answer}
    terms = {
        "trace": _sum(-advantages * ratios.clamped * log_probs, kept) / settings.loss_normalizer,
        "format": _sum(-log_probs, is_format) / settings.loss_normalizer,
        "token": _sum(-signal * log_probs, is_answer) / settings.loss_normalizer,
    }
    loss_sum = (
        settings.trace_loss_weight * terms["trace"]
        + settings.format_loss_weight * terms["format"]
        + settings.token_loss_weight * terms["token"]
    )
    metrics, maxima = _report(batch, terms, ratios, in_trace, weights, settings)
    return LossOutput(loss_sum, terms, {name: mask.sum() for name, mask in masks.items()}, metrics, maxima)


@torch.no_grad()
def _report(
    batch: TokenBatch,
    terms: dict[str, Tensor],
    ratios: _Ratios,
    in_trace: Tensor,
    weights: Optional[Tensor],
    settings: NRT,
) -> tuple[Metrics, dict[str, Number]]:
    """`LOSS_METRICS` and `LOSS_MAXIMA`. Losses are per sequence, all else per token of its kind."""
    sampled = batch.kind == TRACE
    if batch.sampler_log_probs is None:
        gap = (batch.log_probs - batch.old_log_probs).abs()
    else:
        gap = (batch.old_log_probs - batch.sampler_log_probs).abs()
    nothing = torch.zeros((), device=gap.device)
    none = (nothing, nothing)
    per_sequence = {name: (term.detach().double(), float(batch.num_sequences)) for name, term in terms.items()}
    metrics: Metrics = {
        "loss/trace": per_sequence["trace"],
        "loss/format": per_sequence["format"],
        "loss/token": per_sequence["token"],
        "ratio/mean": mean_of(ratios.ratio, in_trace),
        "ratio/drop_share": mean_of(ratios.dropped, in_trace),
        "ratio/clip_share": mean_of(ratios.clamped != ratios.ratio, in_trace),
        "rollout_weight/mean": none if weights is None else mean_of(weights, sampled),
        "rollout_weight/cap_share": (
            none if weights is None else mean_of(weights >= settings.rollout_importance_cap, sampled)
        ),
        "trace/entropy": none if batch.entropy is None else mean_of(batch.entropy, sampled),
        "logprob_gap/abs_mean": mean_of(gap, sampled),
        "marker/format_nll": mean_of(-batch.log_probs, batch.kind == FORMAT),
        "answer/nll": mean_of(-batch.log_probs, batch.kind == ANSWER),
    }
    maxima: dict[str, Number] = {
        "ratio/max": maximum_of(ratios.ratio, in_trace),
        "logprob_gap/max": maximum_of(gap, sampled),
    }
    assert tuple(metrics) == LOSS_METRICS and tuple(maxima) == LOSS_MAXIMA
    return metrics, maxima
