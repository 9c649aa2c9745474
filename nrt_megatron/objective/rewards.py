"""Trace rewards R = f(c) and raw token signals alpha_i c_i = df / d log c_i, in log space.

c_i = pi(y*_i | x, z, m, y*_<i) is the probability of an answer token after the trace, b_i the same after the empty
trace. Native Reasoning Training (arXiv 2602.11549) rewards a trace by an aggregate f of the c_i; the weighted schemes
weigh token i by a constant w(b_i), through which no gradient flows.

Everything is computed in float64, whatever comes in: a product of probabilities leaves float32 at a log-prob sum of
-103 and float64 at -745.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nrt_megatron.objective.metrics import Metrics, mean_of
from nrt_megatron.recipe import NRT

LOG_PROB_FLOOR = -1e4
"""Lower end of a usable log-prob (nats): keeps a probability of 0 from turning its whole group into NaN."""

LARGEST_LOG_WEIGHT = math.log(torch.finfo(torch.float64).max) - 16
"""With no cap set, 1/b stops e^16 below overflow, so that sums over millions of tokens stay finite."""

NOISE_FACTOR = 16
"""Differences up to this many machine epsilons of the log-probs' dtype count as rounding."""

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Scheme:
    """One way to make a trace's reward of the answer's token probabilities.

    Both functions take (log_c, log_b, mask) of shape [N, T] with log-probs <= 0 and finite, and any values outside
    the mask. A row without answer tokens has the reward of an empty sum, product or mean (0, 1 and 0).
    """

    name: str
    """Value of `nrt.reward_scheme`"""
    known_as: str
    reward: Function
    """-> [N]: R = f(c), differentiable in log_c"""
    token_signal: Function
    """-> [N, T]: alpha_i c_i = df / d log c_i, 0 outside the mask"""
    inverse_weight: bool = False
    """Weighs tokens by 1 / b_i: capping that weight at W is flooring log b_i at -log W."""


def _select(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0)


def _length(mask: Tensor) -> Tensor:
    return mask.sum(-1).clamp(min=1)  # [N]


def _log_joint(log_c: Tensor, mask: Tensor) -> Tensor:
    return _select(log_c, mask).sum(-1)  # [N]


def _log_prob(log_c: Tensor, log_b: Tensor, mask: Tensor) -> Tensor:
    return _log_joint(log_c, mask)


def _log_prob_signal(log_c: Tensor, log_b: Tensor, mask: Tensor) -> Tensor:
    return mask.to(log_c.dtype)


def _prob(log_c: Tensor, log_b: Tensor, mask: Tensor) -> Tensor:
    return _log_joint(log_c, mask).exp()


def _prob_signal(log_c: Tensor, log_b: Tensor, mask: Tensor) -> Tensor:
    return _select(_prob(log_c, log_b, mask)[:, None], mask)


def _geometric_mean(log_c: Tensor, log_b: Tensor, mask: Tensor) -> Tensor:
    return (_log_joint(log_c, mask) / _length(mask)).exp()


def _geometric_mean_signal(log_c: Tensor, log_b: Tensor, mask: Tensor) -> Tensor:
    return _select((_geometric_mean(log_c, log_b, mask) / _length(mask))[:, None], mask)


def _arithmetic_mean_signal(log_c: Tensor, log_b: Tensor, mask: Tensor) -> Tensor:
    return _select(_select(log_c, mask).exp(), mask) / _length(mask)[:, None]


def _arithmetic_mean(log_c: Tensor, log_b: Tensor, mask: Tensor) -> Tensor:
    return _arithmetic_mean_signal(log_c, log_b, mask).sum(-1)


def _weighted_inverse_prob_signal(log_c: Tensor, log_b: Tensor, mask: Tensor) -> Tensor:
    log_ratio = _select(log_c, mask) - _select(log_b, mask)  # one exponential: 1 / b alone may overflow
    return _select((log_ratio - _length(mask).log()[:, None]).exp(), mask)


def _weighted_inverse_prob(log_c: Tensor, log_b: Tensor, mask: Tensor) -> Tensor:
    return _weighted_inverse_prob_signal(log_c, log_b, mask).sum(-1)


def _weighted_log_prob_signal(log_c: Tensor, log_b: Tensor, mask: Tensor) -> Tensor:
    return _arithmetic_mean_signal(log_c, log_b, mask) * -_select(log_b, mask)


def _weighted_log_prob(log_c: Tensor, log_b: Tensor, mask: Tensor) -> Tensor:
    return _weighted_log_prob_signal(log_c, log_b, mask).sum(-1)


_TABLE = (
    Scheme("log_prob", "JLB, single-sample JEPO", _log_prob, _log_prob_signal),
    Scheme("prob", "VeriFree", _prob, _prob_signal),
    Scheme("geometric_mean", "NRT-GM", _geometric_mean, _geometric_mean_signal),
    Scheme("arithmetic_mean", "RLPR", _arithmetic_mean, _arithmetic_mean_signal),
    Scheme(
        "weighted_inverse_prob",
        "NRT-WS (1/p)",
        _weighted_inverse_prob,
        _weighted_inverse_prob_signal,
        inverse_weight=True,
    ),
    Scheme("weighted_log_prob", "NRT-WS (-log p)", _weighted_log_prob, _weighted_log_prob_signal),
)

SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in _TABLE}
"""Name -> scheme. A new scheme is its functions and one row of the table above."""


@dataclass(frozen=True)
class TraceRewards:
    """Rewards of N traces before the group step. All float64, detached."""

    raw: Tensor
    """[N]: R = f(c)"""
    baseline: Tensor
    """[N]: f(b), the reward of the empty trace, with the same weights w(b_i)"""
    final: Tensor
    """[N]: raw, or R' = max(0, R - f(b)) with `clip_to_baseline`"""
    noise: Tensor
    """[N]: how far rounding of the log-probs, and `settings.log_prob_error`, alone may move `final`"""
    token_signal: Tensor
    """[N, T]: alpha_i c_i of f (not of the clipped R'), 0 outside the mask"""
    token_noise: Tensor
    """[N]: how far rounding alone may move a row's token signals"""
    metrics: Metrics


@torch.no_grad()
def trace_rewards(scheme: str, log_c: Tensor, log_b: Tensor, mask: Tensor, settings: NRT) -> TraceRewards:
    """Rewards and raw token signals of one scheme.

    log_c, log_b: float [N, T], log-probs of the reference answer after the trace and after the empty trace; natural
    logarithms. mask: bool [N, T], True at answer tokens; values elsewhere are never read. Log-probs above 0 (rounding)
    or below -1e4 are clamped and counted in `reward/clamped_token_share`; weights 1/b above
    `settings.max_inverse_prob_weight` are capped and counted in `reward/capped_weight_share`.

    `clip_to_baseline` subtracts f(b): the scheme's own f with b in place of c, and with the same weights w(b). So a
    trace that changes nothing is worth exactly nothing; for 1/b weights f(b) is 1 unless capped.
    """
    assert scheme in SCHEMES, f"scheme {scheme} has no reward; known: {', '.join(SCHEMES)}"
    chosen, eps = SCHEMES[scheme], torch.finfo(log_c.dtype).eps
    clamped = ((log_c > 0) | (log_c < LOG_PROB_FLOOR), (log_b > 0) | (log_b < LOG_PROB_FLOOR))
    log_c, log_b = (_select(x.double(), mask).clamp(LOG_PROB_FLOOR, 0.0) for x in (log_c, log_b))
    weight_b, capped = log_b, torch.zeros_like(mask)
    if chosen.inverse_weight:
        lowest = -min(math.log(settings.max_inverse_prob_weight), LARGEST_LOG_WEIGHT)
        weight_b, capped = log_b.clamp(min=lowest), log_b < lowest
    raw = chosen.reward(log_c, weight_b, mask)
    baseline = chosen.reward(log_b, weight_b, mask)
    signal = chosen.token_signal(log_c, weight_b, mask)
    # First order: a relative error of one eps in every log c_i, and one in the sum.
    noise = NOISE_FACTOR * eps * (raw.abs() + (signal * log_c).abs().sum(-1))
    # The model's own errors, independent from token to token, move f by the norm of its gradient times one of them;
    # a group of them alone spreads by more than twice that once in thousands.
    noise = torch.maximum(noise, 2 * settings.log_prob_error * signal.norm(dim=-1))
    largest = signal.abs().amax(-1) if signal.size(1) else torch.zeros_like(raw)
    better = raw - baseline > torch.maximum(noise, NOISE_FACTOR * eps * baseline.abs())
    final = raw
    if settings.clip_to_baseline:
        final = (raw - baseline).clamp(min=0.0)
        noise = torch.maximum(noise, NOISE_FACTOR * eps * baseline.abs())
    metrics: Metrics = {
        "reward/trace_mean": mean_of(raw),
        "reward/baseline_mean": mean_of(baseline),
        "reward/above_baseline_share": mean_of(better),
        "reward/zero_share": mean_of(raw == 0),
        "reward/clamped_token_share": mean_of(clamped[0] | clamped[1], mask),
        "reward/capped_weight_share": mean_of(capped, mask),
    }
    return TraceRewards(
        raw=raw,
        baseline=baseline,
        final=final,
        noise=noise,
        token_signal=signal,
        token_noise=max(NOISE_FACTOR * eps, 2 * settings.log_prob_error) * largest,
        metrics=metrics,
    )


def multi_sample_bound(log_c: Tensor, mask: Tensor, group: Tensor) -> Tensor:
    """JEPO's multi-sample Jensen bound of each group: log (1/K) sum_k prod_i c_ik, a lower bound on log P(y* | x).

    log_c: float [N, T]; mask: bool [N, T]; group: int64 [N], any ids, groups of any size. Returns [G] in the order of
    the sorted ids, differentiable: its gradient in the log-joint of trace k is the trace's share of the group's sum.
    """
    log_joint = _log_joint(log_c.clamp(LOG_PROB_FLOOR, 0.0), mask)  # [N]
    ids, index, size = group.unique(return_inverse=True, return_counts=True)
    highest = log_joint.new_full((len(ids),), -torch.inf)
    highest = highest.scatter_reduce(0, index, log_joint.detach(), "amax")  # [G]
    total = torch.zeros_like(highest).index_add(0, index, (log_joint - highest[index]).exp())
    return highest + total.log() - size.to(log_joint.dtype).log()
