"""Metrics of a step: collected on each rank, reduced over all of them in two all-reduces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist

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
            self.maxima[name] = max(float(value), float(self.maxima.get(name, -torch.inf)))

    def reduce(self, place: Place) -> dict[str, float]:
        """The row of a step. Collective: every rank calls it; to sums one rank of each model replica contributes.

        A mean without any count is left out: nothing happened that could be averaged.
        """
        contributes = place.speaks_for_replica
        names, phases, peaks = sorted(self.sums), sorted(self.tokens), sorted(self.maxima)
        rows = [self.sums[n] for n in names] + [(self.tokens[p], 0.0) for p in phases]
        pairs = _table(rows, (0.0, 0.0), contributes).to(place.device)  # [names + phases, 2]
        tops = _table([(self.maxima[n],) for n in peaks], (-torch.inf,), True).to(place.device)
        dist.all_reduce(pairs)
        dist.all_reduce(tops, dist.ReduceOp.MAX)
        totals = pairs.tolist()
        row = {n: s / c for n, (s, c) in zip(names, totals) if c}
        row |= {f"tokens/{p}": s for p, (s, _) in zip(phases, totals[len(names) :])}
        row |= {n: v for n, (v,) in zip(peaks, tops.tolist()) if v > -torch.inf}
        return row | self.values


def _table(rows: list[tuple[Number, ...]], nothing: tuple[float, ...], contributes: bool) -> torch.Tensor:
    """float64 [rows, width]; filled with `nothing` on ranks that do not contribute."""
    filled = [[float(x) for x in row] if contributes else list(nothing) for row in rows]
    return torch.tensor(filled, dtype=torch.float64).reshape(-1, len(nothing))


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
