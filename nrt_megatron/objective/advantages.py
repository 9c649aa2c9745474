"""The group step: rewards and token signals relative to the K traces of their prompt.

A group whose spread is no more than rounding says nothing about which trace is better. Its advantages are exactly
0 and it is counted; dividing by such a spread would turn noise of 1e-7 into advantages of 2.8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nrt_megatron.objective.metrics import Metrics, mean_of
from nrt_megatron.objective.rewards import NOISE_FACTOR


def _relative_to_group(
    values: Tensor, index: Tensor, num_groups: int, noise: Tensor, center: str, scale: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Centres and scales within groups.

    values, noise: [M]; index: int64 [M], group of each value. Returns float64 (values [M], std [G], degenerate bool
    [G]). A group is degenerate when it has one member, or when its sample standard deviation (divisor K - 1) is not
    above the noise of its noisiest member; its centred or scaled values are 0.
    """
    assert center in ("mean", "none") and scale in ("std", "none"), (center, scale)
    values = values.double()
    zeros = values.new_zeros(num_groups)
    count = zeros.index_add(0, index, torch.ones_like(values))  # [G]
    # In units of the group's largest magnitude no square can overflow or underflow.
    unit = zeros.scatter_reduce(0, index, values.abs(), "amax")
    unit = torch.where(unit == 0, 1.0, unit)
    relative = values / unit[index]
    mean = zeros.index_add(0, index, relative) / count.clamp(min=1)
    centred = relative - mean[index]
    variance = zeros.index_add(0, index, centred.square()) / (count - 1).clamp(min=1)
    std = variance.sqrt()
    floor = zeros.scatter_reduce(0, index, noise.double(), "amax") / unit
    degenerate = (count < 2) | (std <= floor)
    out = centred if center == "mean" else relative
    out = out / torch.where(degenerate, 1.0, std)[index] if scale == "std" else out * unit[index]
    if center == "mean" or scale == "std":
        out = torch.where(degenerate[index], 0.0, out)
    return out, std * unit, degenerate


def _rounding(values: Tensor) -> Tensor:
    return NOISE_FACTOR * torch.finfo(values.dtype).eps * values.abs()


@torch.no_grad()
def group_advantages(
    rewards: Tensor, group: Tensor, center: str, scale: str, noise: Tensor | None = None
) -> tuple[Tensor, Metrics]:
    """Advantages of traces within their groups.

    rewards: float [N], penalties included. group: int64 [N], any ids in any order, groups of any size. center: `mean`
    or `none`; scale: `std` (sample standard deviation, divisor K - 1) or `none`. noise: float [N], how far rounding
    may have moved each reward (`TraceRewards.noise`); default 16 eps of the rewards' dtype times their magnitude.

    Returns advantages [N] in the rewards' dtype. Groups of one and groups without spread get exactly 0 as soon as
    anything is centred or scaled, and count in `reward/degenerate_group_share` in any case.
    """
    ids, index = group.unique(return_inverse=True)
    noise = _rounding(rewards) if noise is None else noise
    out, std, degenerate = _relative_to_group(rewards, index, len(ids), noise, center, scale)
    metrics: Metrics = {
        "reward/final_mean": mean_of(rewards),
        "reward/group_std_mean": mean_of(std),
        "reward/degenerate_group_share": mean_of(degenerate),
        "reward/advantage_abs_mean": mean_of(out.abs()),
    }
    return out.to(rewards.dtype), metrics


@torch.no_grad()
def group_token_signal(
    signal: Tensor,
    mask: Tensor,
    group: Tensor,
    kind: str,
    center: str,
    scale: str,
    noise: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Weight s_i of each answer token in the token loss.

    signal: float [N, T], the raw alpha_i c_i; mask: bool [N, T]; group: int64 [N]. kind: `fixed` (1 at every answer
    token), `raw` (as is), or `normalised` (centred and scaled over all answer tokens of the group, as the authors'
    code does; center, scale and degenerate groups as in `group_advantages`). noise: float [N], rounding of each row's
    signals (`TraceRewards.token_noise`). Returns [N, T] in the signal's dtype, 0 outside the mask.
    """
    assert kind in ("fixed", "raw", "normalised"), kind
    metrics: Metrics = {"reward/degenerate_token_group_share": (0.0, 0.0)}
    if kind == "fixed":
        out = mask.to(signal.dtype)
    elif kind == "raw":
        out = torch.where(mask, signal, 0.0)
    else:
        ids, index = group.unique(return_inverse=True)
        row = mask.nonzero(as_tuple=True)[0]  # [M], the sequence of each answer token
        values = signal[mask]
        rounding = _rounding(values) if noise is None else noise[row]
        flat, _, degenerate = _relative_to_group(values, index[row], len(ids), rounding, center, scale)
        out = torch.zeros_like(signal)
        out[mask] = flat.to(signal.dtype)
        metrics["reward/degenerate_token_group_share"] = mean_of(degenerate)
    metrics["reward/token_signal_mean"] = mean_of(out, mask)
    metrics["reward/token_signal_abs_mean"] = mean_of(out.abs(), mask)
    return out, metrics
