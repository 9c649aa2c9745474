"""Which rank holds the others up, from the seconds that each one worked."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class Position:
    """Where a rank is, and with whom it can be compared."""

    host: str
    replica: int
    """Of the model. Ranks of the same replica and stage wait for each other in every layer: their times are one."""
    stage: int
    """Of the pipeline; 0 in a phase that all stages of a replica end together. Peers are of the same stage."""


class Stragglers:
    """Compares the ranks of every step, phase by phase."""

    def __init__(self, positions: dict[str, Sequence[Position]], ratio: float, steps: int):
        """positions: phase -> position of every rank. A unit is slow at `ratio` times its peers' mean; to be so and the
        slowest for `steps` steps in a row is said."""
        self._positions, self._ratio, self._steps = positions, ratio, steps
        self._slow = dict.fromkeys(positions, (-1, 0))
        """phase -> first rank of the unit that is slow, steps in a row"""

    def judge(self, seconds: dict[str, Sequence[float]]) -> tuple[dict[str, float], list[str]]:
        """`seconds`: phase -> those that each rank worked, NaN where it did not. Returns metrics, and lines to say.

        Of each phase: `straggler/PHASE_{max, min, mean}` seconds over ranks; `_ratio`, the seconds of the slowest unit
        over the mean of its peers; `_rank`, its first rank. Nothing where a rank has no peers.
        """
        metrics: dict[str, float] = {}
        lines = []
        for phase, own in seconds.items():
            units = self._units(phase, own)
            ratios = _ratios(units)
            if not ratios:
                continue
            slowest = max(ratios, key=lambda unit: ratios[unit])
            rank = self._ranks(phase, slowest)[0]
            worked = [value for value in own if not math.isnan(value)]
            figures = {"max": max(worked), "min": min(worked), "mean": fmean(worked)}
            figures |= {"ratio": ratios[slowest], "rank": rank}
            metrics |= {f"straggler/{phase}_{name}": value for name, value in figures.items()}
            if self._long_enough(phase, rank, ratios[slowest]):
                lines.append(self._line(phase, slowest, ratios[slowest]))
        return metrics, lines

    def _units(self, phase: str, own: Sequence[float]) -> dict[tuple[int, int], float]:
        """(replica, stage) -> the most seconds of its ranks"""
        units: dict[tuple[int, int], float] = defaultdict(float)
        for at, value in zip(self._positions[phase], own, strict=True):
            if not math.isnan(value):
                unit = (at.replica, at.stage)
                units[unit] = max(units[unit], value)
        return units

    def _ranks(self, phase: str, unit: tuple[int, int]) -> list[int]:
        return [rank for rank, at in enumerate(self._positions[phase]) if (at.replica, at.stage) == unit]

    def _long_enough(self, phase: str, rank: int, ratio: float) -> bool:
        """Whether this is the step in which it is to be said."""
        before, steps = self._slow[phase]
        now = 0 if ratio < self._ratio else steps + 1 if rank == before else 1
        self._slow[phase] = (rank, now)
        return now == self._steps

    def _line(self, phase: str, unit: tuple[int, int], ratio: float) -> str:
        ranks = self._ranks(phase, unit)
        hosts = ", ".join(dict.fromkeys(self._positions[phase][rank].host for rank in ranks))
        who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
        return (
            f"straggler: {who} on {hosts} took {ratio:.1f} times as long as the peers in {phase}, and was the "
            f"slowest for {self._steps} steps in a row"
        )


def _ratios(units: dict[tuple[int, int], float]) -> dict[tuple[int, int], float]:
    """Seconds of a unit over the mean of its peers, for those that have any."""
    count, total = Counter(stage for _, stage in units), Counter[int]()
    for (_, stage), value in units.items():
        total[stage] += value
    peers = {unit: (total[unit[1]] - value, count[unit[1]] - 1) for unit, value in units.items()}
    return {unit: units[unit] * others / rest for unit, (rest, others) in peers.items() if others and rest > 0}
