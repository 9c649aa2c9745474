"""Numbers as people read them. A metric that a row does not have is shown as a dash, never as 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

DASH = "–"
PHASES = ("rollout", "scoring", "update")


def number(value: Any, spec: str = ".3f") -> str:
    """`value` in a format spec; a dash for None."""
    return DASH if value is None else format(value, spec)


def short(value: float) -> str:
    """1234 -> `1.2k`, 1234567 -> `1.2M`."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


def size(num_bytes: float | None) -> str:
    """Bytes in GiB."""
    return DASH if num_bytes is None else f"{num_bytes / 2**30:.2f} GiB"


def duration(seconds: float) -> str:
    """`h:mm:ss`, or `m:ss` below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def tokens_per_second(rows: Sequence[Mapping[str, Any]], phase: str) -> float | None:
    """Tokens of `phase` over the seconds it took, summed over the rows that have both; None where none has."""
    pairs = [(row.get(f"tokens/{phase}"), row.get(f"time/{phase}")) for row in rows]
    known = [(tokens, seconds) for tokens, seconds in pairs if tokens is not None and seconds]
    return sum(t for t, _ in known) / sum(s for _, s in known) if known else None


def speeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`tokens_per_second` of each phase that was measured."""
    measured = {phase: tokens_per_second(rows, phase) for phase in PHASES}
    return {phase: speed for phase, speed in measured.items() if speed is not None}
