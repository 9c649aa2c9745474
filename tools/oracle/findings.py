"""What a comparison found: largest errors, counts, and failures in words."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor

TOLERANCE = 1e-6


class NotComparable(ValueError):
    """A case without a meaning here: unknown mode, setting or shape. It fails the check, it is never skipped."""


@dataclass
class Findings:
    """Findings of one file. names: what must have been compared at least once; optional: what a file may lack."""

    names: Sequence[str]
    optional: Sequence[str] = ()
    verbose: bool = False
    errors: dict[str, float] = field(default_factory=dict)
    compared: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    cases: int = 0
    blocks: int = 0
    undefined: int = 0

    def note(self, where: str, name: str, error: float, count: int) -> None:
        """Records the largest relative error of `count` values; NaN fails as well."""
        worst = self.errors.get(name, 0.0)
        self.errors[name] = error if math.isnan(error) else max(worst, error)
        self.compared[name] = self.compared.get(name, 0) + count
        if not error <= TOLERANCE:
            self.failures.append(f"{where}: {name} is off by {error:.3g} relative")
        if self.verbose:
            print(f"{where}: {name} {error:.3g} over {count}", file=sys.stderr)

    def attempt(self, where: str, action: Callable[..., None], *args: Any) -> None:
        """Runs one case or block; what stops it becomes a failure in words."""
        try:
            action(*args)
        except NotComparable as error:
            self.failures.append(f"{where}: {error}")
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            text = " ".join(str(error).split())
            self.failures.append(f"{where}: malformed ({type(error).__name__}: {text})")

    def check_count(self, where: str, key: str, holder: dict, items: list) -> None:
        """A recorded number of items has to be the number of items."""
        if key in holder and holder[key] != len(items):
            self.failures.append(f"{where}: {key} is {holder[key]}, but there are {len(items)}")

    def summary(self) -> dict[str, Any]:
        """The file's part of the JSON line; what was never compared is a failure."""
        self.failures += [f"{name}: never compared" for name in self.names if not self.compared.get(name)]
        names = (*self.names, *self.optional)
        return {
            "cases": self.cases,
            "blocks": self.blocks,
            "undefined_in_reference": self.undefined,
            "max_rel_error": {name: _json_number(self.errors.get(name)) for name in names},
            "values_compared": {name: self.compared.get(name, 0) for name in names},
        }


def _json_number(x: Optional[float]) -> float | str | None:
    return x if x is None or math.isfinite(x) else str(x)


def _numbers(values: Any) -> list[Optional[float]]:
    """A flat list of floats from a possibly ragged one; null (not a number in the reference) as None."""
    flat = [x for v in values for x in (v if isinstance(v, list) else [v])]
    return [None if x is None or not math.isfinite(x) else float(x) for x in flat]


def compare(
    findings: Findings,
    where: str,
    name: str,
    ours: Tensor,
    theirs: Any,
    group: Optional[Tensor] = None,
    size: Optional[Tensor] = None,
) -> None:
    """Notes the largest difference relative to the largest recorded magnitude, by group.

    ours: [M]; theirs: M numbers, ragged lists allowed, null where the reference is not a number (there ours only has
    to be finite). group: int64 [M], default one group. size: [M], magnitudes before centring; where what was recorded
    is mere residue of them (equal rewards, centred), the difference is taken relative to `size`.
    """
    recorded = _numbers(theirs)
    if len(recorded) != ours.numel():
        raise NotComparable(f"{name}: {len(recorded)} values recorded, {ours.numel()} computed")
    if not ours.isfinite().all():
        raise NotComparable(f"{name}: not finite here")
    if not recorded:
        return
    known = torch.tensor([x is not None for x in recorded])
    want = torch.tensor([x or 0.0 for x in recorded], dtype=torch.float64)
    difference = torch.where(known, (ours.detach().double() - want).abs(), 0.0)
    index = torch.zeros(len(want), dtype=torch.int64) if group is None else group
    worst = 0.0
    for g in index.unique():
        largest = want[index == g].abs().max()
        before = largest if size is None else size[index == g].abs().max()
        scale = largest if largest > 1e-9 * before else before
        worst = max(worst, float(difference[index == g].max() / torch.where(scale == 0, 1.0, scale)))
    findings.undefined += recorded.count(None)
    findings.note(where, name, worst, int(known.sum()))
