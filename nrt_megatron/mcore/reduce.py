"""Metrics over all ranks in two all-reduces."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from nrt_megatron.mcore.runtime import Runtime


def reduce_metrics(
    runtime: Runtime,
    sums: Mapping[str, tuple[float | torch.Tensor, float | torch.Tensor]],
    maxima: Mapping[str, float | torch.Tensor],
    *,
    contributes: bool,
) -> dict[str, float]:
    """Means sum / count and maxima over the ranks that contribute (one of each model replica).

    Every rank passes the same keys in any order. A mean without any count is left out: nothing happened that
    could be averaged.
    """
    names, peaks = sorted(sums), sorted(maxima)
    pairs = torch.zeros(len(names), 2, dtype=torch.float64)
    tops = torch.full((len(peaks),), -torch.inf, dtype=torch.float64)
    if contributes:
        pairs = torch.tensor([[float(x) for x in sums[n]] for n in names], dtype=torch.float64).reshape(-1, 2)
        tops = torch.tensor([float(maxima[n]) for n in peaks], dtype=torch.float64)
    pairs, tops = pairs.to(runtime.device), tops.to(runtime.device)
    dist.all_reduce(pairs)
    dist.all_reduce(tops, dist.ReduceOp.MAX)
    means = {n: s / c for n, (s, c) in zip(names, pairs.tolist()) if c}
    return means | {n: v for n, v in zip(peaks, tops.tolist()) if v > -torch.inf}
