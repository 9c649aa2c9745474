"""Metrics of a step: collected on each rank, reduced over all of them in two all-reduces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nrt_megatron.mcore.place import Place
from nrt_megatron.objective.metrics import Metrics, Number

T = TypeVar("T")


@dataclass
class StepMetrics:
    """What one rank knows of a step. Every rank has the same names, with zero counts where it knows nothing."""

    sums: Metrics = field(default_factory=dict)
    """name -> (sum, count): reported as sum / count over all replicas"""
    maxima: dict[str, Number] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)
    """phase -> tokens of this replica: reported as the sum over replicas, `tokens/PHASE`"""
    values: dict[str, float] = field(default_factory=dict)
    """Numbers that are the same on all ranks."""

    def add(self, sums: Metrics, maxima: Mapping[str, Number] | None = None) -> None:
        """Adds sums and counts, and keeps the larger maxima."""
        for name, (total, count) in sums.items():
            old = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (old[0] + total, old[1] + count)
        for name, value in (maxima or {}).items():
            self.maxima[name] = _larger(value, self.maxima.get(name, -torch.inf))

    def reduce(self, place: Place) -> dict[str, float]:
        """The row of a step. Collective: every rank calls it; to sums one rank of each model replica contributes.

        A mean without any count is left out: nothing happened that could be averaged.
        """
        contributes = place.speaks_for_replica
        names, phases, peaks = sorted(self.sums), sorted(self.tokens), sorted(self.maxima)
        rows = [self.sums[n] for n in names] + [(self.tokens[p], 0.0) for p in phases]
        pairs = _table(rows if contributes else [(0.0, 0.0)] * len(rows), 2, place.device)  # [names + phases, 2]
        tops = _table([(self.maxima[n],) for n in peaks], 1, place.device)
        dist.all_reduce(pairs)
        dist.all_reduce(tops, dist.ReduceOp.MAX)
        totals = pairs.tolist()
        row = {n: s / c for n, (s, c) in zip(names, totals) if c}
        row |= {f"tokens/{p}": s for p, (s, _) in zip(phases, totals[len(names) :])}
        row |= {n: v for n, (v,) in zip(peaks, tops.tolist()) if v > -torch.inf}
        return row | self.values


def _larger(a: Number, b: Number) -> Number:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.maximum(a, b)
    if isinstance(a, Tensor):
        return a.clamp(min=float(b))
    return b.clamp(min=a) if isinstance(b, Tensor) else max(a, b)


def _table(rows: list[tuple[Number, ...]], width: int, device: torch.device) -> Tensor:
    """float64 [rows, width]. Numbers that are tensors stay on their device: the host does not wait for any of them."""
    entries = [entry for row in rows for entry in row]
    known = [0.0 if isinstance(entry, Tensor) else float(entry) for entry in entries]
    table = torch.tensor(known, dtype=torch.float64, device=device)
    measured = {i: entry for i, entry in enumerate(entries) if isinstance(entry, Tensor)}
    if measured:
        values = torch.stack([entry.detach().to(device, torch.float64).reshape(()) for entry in measured.values()])
        table[torch.tensor([*measured], device=device)] = values
    return table.view(-1, width)


def reduce_max(values: list[float], device: torch.device) -> list[float]:
    """The largest of each value over all ranks. Collective."""
    table = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(table, dist.ReduceOp.MAX)
    return table.tolist()


def from_main(value: T) -> T:
    """What the main rank has in place of `value`, a small object. Collective."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def from_all(values: list[float], device: torch.device) -> list[list[float]]:
    """The values of every rank, in rank order. Collective; all ranks have as many."""
    table = torch.empty(dist.get_world_size(), len(values), dtype=torch.float64, device=device)
    dist.all_gather(list(table), torch.tensor(values, dtype=torch.float64, device=device))
    return table.tolist()
