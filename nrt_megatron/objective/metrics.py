"""What is watched in every step and needs no model: pure tensor math over one rank's traces.

Every function returns `Metrics`: name -> (sum, count), to be added over micro-batches and ranks and divided once at
the end. Maxima are kept apart because they combine by max; -inf stands for nothing seen. Sums and counts are
0-dimensional tensors on the inputs' device, so nothing here waits for a GPU.
"""

from __future__ import annotations

from typing import Union

import torch
from torch import Tensor

Number = Union[float, Tensor]
Metrics = dict[str, tuple[Number, Number]]
"""Metric name -> (sum, count); its value is sum / count once both are summed over all ranks."""

HARD_BELOW = 0.5
"""An answer token is hard when the model gives it less probability than this without a trace."""


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """float64 sum of `values` where `mask`; what is masked out may be anything, NaN included."""
    return torch.where(mask, values.double(), 0.0).sum()


def mean_of(values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(sum, count) of `values`, a bool or float tensor of any shape, where `mask`."""
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    return masked_sum(values, mask), mask.sum()


def maximum_of(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Largest of `values` where `mask`; -inf where there is none."""
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    lowest = values.new_full((1,), -torch.inf, dtype=torch.float64)
    return torch.cat([torch.where(mask, values.double(), -torch.inf).flatten(), lowest]).max()


def trace_metrics(lengths: Tensor, truncated: Tensor, produced_marker: Tensor) -> Metrics:
    """Length of traces, and how they ended.

    lengths: int64 [N], sampled trace tokens without the marker. truncated: bool [N], cut at the limit.
    produced_marker: bool [N], the policy drew the end-of-trace marker itself.
    """
    return {
        "trace/length_mean": mean_of(lengths),
        "trace/empty_share": mean_of(lengths == 0),
        "trace/truncated_share": mean_of(truncated),
        "trace/marker_share": mean_of(produced_marker),
    }


def trace_maxima(lengths: Tensor) -> dict[str, Number]:
    """`trace/length_max` of int64 lengths [N]; -inf for no traces."""
    return {"trace/length_max": maximum_of(lengths)}


def distinct_ngrams(ids: Tensor, lengths: Tensor, group: Tensor, n: int = 2) -> Metrics:
    """Distinct n-grams among all n-grams of a group's traces: near 0 when the traces of a prompt collapse.

    ids: int64 [N, L], only the first lengths[i] of row i are read. group: int64 [N], any ids. A trace shorter than
    n has no n-gram. The metric `trace/distinct_{n}gram` weighs every n-gram alike.
    """
    name = f"trace/distinct_{n}gram"
    starts = ids.size(1) - n + 1
    if starts <= 0 or not len(ids):
        zero = torch.zeros((), device=ids.device)
        return {name: (zero, zero)}
    first = torch.arange(starts, device=ids.device)
    inside = first + n <= lengths[:, None]  # [N, starts]
    row, column = inside.nonzero(as_tuple=True)  # [m]
    _, key = group[row].unique(return_inverse=True)
    for offset in range(n):  # one number per (group, token, .., token): renumbered at each step, it cannot overflow
        _, token = ids[row, column + offset].unique(return_inverse=True)
        _, key = (key * (token.max() + 1 if len(token) else 1) + token).unique(return_inverse=True)
    distinct = key.max() + 1 if len(key) else key.new_zeros(())
    return {name: (distinct, inside.sum())}


def answer_metrics(log_c: Tensor, log_b: Tensor, mask: Tensor) -> Metrics:
    """P(y*) with and without the trace: per token, per answer (geometric mean), and by hard and easy tokens.

    log_c, log_b: float [N, T], log-probs of the reference answer with the trace and without. mask: bool [N, T].
    Hard tokens have b_i < 0.5; the split goes by b_i in both columns, so hard_with_trace minus hard_without_trace is
    what the traces add where the model was unsure.
    """
    log_c, log_b = log_c.double().clamp(max=0.0), log_b.double().clamp(max=0.0)
    hard = log_b.exp() < HARD_BELOW
    answered = mask.any(-1)  # [N]
    metrics: Metrics = {"answer/hard_share": mean_of(hard, mask)}
    for suffix, log_p in (("with_trace", log_c), ("without_trace", log_b)):
        tokens = mask.sum(-1).clamp(min=1)
        geometric = (torch.where(mask, log_p, 0.0).sum(-1) / tokens).exp()  # [N]
        metrics[f"answer/prob_{suffix}"] = mean_of(log_p.exp(), mask)
        metrics[f"answer/geometric_prob_{suffix}"] = mean_of(geometric, answered)
        metrics[f"answer/prob_hard_{suffix}"] = mean_of(log_p.exp(), mask & hard)
        metrics[f"answer/prob_easy_{suffix}"] = mean_of(log_p.exp(), mask & ~hard)
    return metrics
