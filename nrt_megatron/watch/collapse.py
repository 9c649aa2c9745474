"""Signs of collapse in the metrics of a run, and which checkpoint is from before it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Optional

from nrt_megatron.recipe import ConfigError, Sign, Watch

METRICS = {
    "entropy": "trace/entropy",
    "length": "trace/length_mean",
    "empty_share": "trace/empty_share",
    "distinct_2gram": "trace/distinct_2gram",
    "degenerate_group_share": "reward/degenerate_group_share",
    "group_std": "reward/group_std_mean",
}
"""Key of `watch` -> what it looks at in the row of a step."""
_OF_GROUPS = ("degenerate_group_share", "group_std")
"""Signs about the spread within a group, which a group of one has not."""


@dataclass(frozen=True)
class Alarm:
    """A sign that has been outside its bounds for as many steps as its recipe section says."""

    sign: str
    value: float
    """In the last step that had the metric."""
    side: str
    """`below` or `above`"""
    bound: float
    steps: int
    since: int
    """Step in which the metric left its bounds."""
    action: str

    @property
    def key(self) -> str:
        """Of the bound in the recipe."""
        return f"watch.{self.sign}.{self.side}"

    @property
    def what(self) -> str:
        """What was seen, without the bound."""
        seen = f"{METRICS[self.sign]} {self.value:.4g} is {self.side} it"
        return f"{seen}, {self.steps} steps in a row since step {self.since}"

    def __str__(self) -> str:
        seen = f"{METRICS[self.sign]} {self.value:.4g} is {self.side} {self.key} = {self.bound:g}"
        return f"{seen}, {self.steps} steps in a row since step {self.since}"


class CollapseError(ConfigError):
    """A run that shows what its recipe calls a collapse has been ended, its last step saved; exit code 2."""

    @classmethod
    def of(cls, alarm: Alarm, cfg: Watch, step: int, good: Optional[int], rollbacks: int) -> CollapseError:
        """step: that of the checkpoint just written; good: that of one to go back to, None without any."""
        go_on = f"set watch.{alarm.sign}.action=warn to go on from the checkpoint of step {step}"
        if alarm.action == "stop":
            back = f", or rollback to go back to step {good}" if good else ""
            return cls.at(alarm.key, alarm.bound, alarm.what, go_on + back)
        if good and rollbacks >= cfg.max_rollbacks:
            problem = f"so many rollbacks did not help: {alarm.what}"
            return cls.at(
                "watch.max_rollbacks", cfg.max_rollbacks, problem, f"set more, lower policy.optimizer.lr, or {go_on}"
            )
        problem = f"no checkpoint is known to be from before: {alarm.what}"
        remedy = f"{go_on}, or start in another run_dir with a lower checkpointing.every"
        return cls.at(f"watch.{alarm.sign}.action", alarm.action, problem, remedy)


@dataclass
class _Streak:
    """Steps in a row with a metric outside; steps without the metric neither count nor end it."""

    steps: int
    since: int
    value: float


class CollapseWatch:
    """Judges the row of every step, and knows which checkpoint was saved in health.

    A row shows the traces of the weights that the step began with. So the checkpoint of step n is known to be good
    when row n, which led to it, and row n + 1, the first that it made, are both inside all bounds. Every sign that
    has bounds counts for that, whatever its action.

    Every rank has one and judges the same rows. Its state is equal on all and goes into the checkpoints.
    """

    def __init__(self, cfg: Watch, group_size: int):
        """group_size: K, the traces of a question."""
        self._cfg = cfg
        self._signs: dict[str, Sign] = {
            name: getattr(cfg, name) for name in METRICS if group_size > 1 or name not in _OF_GROUPS
        }
        self._streaks: dict[str, _Streak] = {}
        self.good: Optional[int] = None
        """Step of the newest checkpoint known to be good."""
        self._candidate: Optional[int] = None
        """Step of the newest checkpoint saved in health, which the next row is to judge."""
        self.rollbacks = 0
        """Made so far, in the whole run."""
        self._said_none_is_good = False

    def judge(self, step: int, row: Mapping[str, Any]) -> tuple[dict[str, float], list[str]]:
        """Takes in the row of a step; returns what to add to it, and what to say: one line at the beginning of an
        episode that is long enough for its action, and one at its end.

        `watch/SIGN`: steps outside in a row so far; `watch/alarms`: signs that have been outside for long enough;
        `watch/rollbacks`: made so far. Nothing for a row without traces.
        """
        seen = {name: row.get(METRICS[name]) for name in self._signs}
        if all(value is None for value in seen.values()):
            return {}, []
        lines = [line for name, value in seen.items() if (line := self._judge(name, step, value))]
        if self._candidate is not None and self.healthy:
            self.good = self._candidate
        self._candidate = None
        watched = [name for name, sign in self._signs.items() if (sign.below, sign.above) != (None, None)]
        metrics = {f"watch/{name}": self._steps(name) for name in watched}
        return metrics | {"watch/alarms": len(list(self._alarms())), "watch/rollbacks": self.rollbacks}, lines

    def _judge(self, name: str, step: int, value: Optional[float]) -> Optional[str]:
        if value is None or not math.isfinite(value):  # updates that are not finite have a limit of their own
            return None
        sign, streak = self._signs[name], self._streaks.get(name)
        if _side(sign, value) is None:
            self._streaks.pop(name, None)
            if streak is not None and streak.steps >= sign.steps:
                return f"collapse watch: {METRICS[name]} {value:.4g} is inside again after {streak.steps} steps"
            return None
        streak = self._streaks.setdefault(name, _Streak(0, step, value))
        streak.steps, streak.value = streak.steps + 1, value
        return f"collapse watch: {self._alarm(name)}" if streak.steps == sign.steps else None

    @property
    def healthy(self) -> bool:
        """Whether every sign was inside its bounds when last seen."""
        return not self._streaks

    def due(self) -> Optional[Alarm]:
        """What the run has to act on now, by the present recipe: first what is to stop it."""
        acting = [alarm for alarm in self._alarms() if alarm.action != "warn"]
        return min(acting, key=lambda alarm: alarm.action != "stop", default=None)

    def _alarms(self) -> Iterator[Alarm]:
        return (self._alarm(name) for name in self._streaks if self._steps(name) >= self._signs[name].steps)

    def _alarm(self, name: str) -> Alarm:
        sign, streak = self._signs[name], self._streaks[name]
        side = _side(sign, streak.value)
        assert side is not None, "a streak is of values outside"
        bound = getattr(sign, side)
        return Alarm(name, streak.value, side, bound, streak.steps, streak.since, sign.action)

    def _steps(self, name: str) -> int:
        return self._streaks[name].steps if name in self._streaks else 0

    def saving(self, step: int) -> list[str]:
        """To be told before a checkpoint of `step` is written. Returns what to say: one line at the first that does not
        count while a rollback would find no other, as with a bound that does not fit the task."""
        if self.healthy:
            self._candidate = step
            return []
        rolls_back = any(sign.action == "rollback" for sign in self._signs.values())
        if not rolls_back or self.good is not None or self._said_none_is_good:
            return []
        self._said_none_is_good = True
        longest = min(self._streaks, key=lambda name: self._streaks[name].since)
        remedy = (
            f"if traces are as they should be, set watch.{longest}.{self._alarm(longest).side} to what fits or null"
        )
        return [f"collapse watch: still no checkpoint to roll back to at step {step}: {self._alarm(longest)}; {remedy}"]

    @property
    def spared(self) -> frozenset[int]:
        """Checkpoints that a rollback may need; none where signs only warn."""
        acts = any(sign.action != "warn" for sign in self._signs.values())
        return frozenset({self.good}) if acts and self.good is not None else frozenset()

    def gone_back(self, step: int, number: int) -> None:
        """The run stands at the good checkpoint of `step` again, after its rollback `number`."""
        self._streaks, self._candidate = {}, None
        self.good, self.rollbacks = step, number

    def state_dict(self) -> dict[str, Any]:
        """In JSON types."""
        streaks = {name: asdict(streak) for name, streak in self._streaks.items()}
        return {"streaks": streaks, "good": self.good, "candidate": self._candidate, "rollbacks": self.rollbacks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`; what a changed recipe no longer calls outside is forgotten."""
        streaks = {name: _Streak(**streak) for name, streak in state["streaks"].items() if name in self._signs}
        self._streaks = {n: streak for n, streak in streaks.items() if _side(self._signs[n], streak.value) is not None}
        self.good, self._candidate, self.rollbacks = state["good"], state["candidate"], state["rollbacks"]


def _side(sign: Sign, value: float) -> Optional[str]:
    """The bound that a value is beyond, None inside."""
    if sign.below is not None and value < sign.below:
        return "below"
    return "above" if sign.above is not None and value > sign.above else None
