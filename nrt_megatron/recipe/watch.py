"""The section `watch`: what a collapsing run shows, and what is to be done about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional


@dataclass(frozen=True)
class Sign:
    """One sign of collapse: a metric outside its bounds for some steps in a row. Without bounds it is not looked at."""

    below: Optional[float] = None
    """Outside when the metric is below this; null: no bound."""
    above: Optional[float] = None
    """Outside when the metric is above this; null: no bound."""
    steps: int = 10
    """So many steps outside in a row call for the action."""
    action: str = "warn"
    """`warn`: one line; `stop`: save a checkpoint and end with exit code 2; `rollback`: go back to the last checkpoint
    from before, and on with other questions and other random numbers."""


@dataclass(frozen=True)
class Watch:
    """Collapse and stragglers.

    The defaults warn and do nothing else: what is a collapse depends on the task, and a run is not to end by a guess of
    ours. They are set where no reasoning is left, so that a line means something.
    """

    entropy: Sign = field(default_factory=lambda: Sign(below=0.02, above=6.0))
    """`trace/entropy`, nats per trace token. Base models sample at 0.5 to 3; all traces alike below, noise above."""
    length: Sign = field(default_factory=lambda: Sign(below=4.0))
    """`trace/length_mean`, tokens."""
    empty_share: Sign = field(default_factory=lambda: Sign(above=0.5))
    """`trace/empty_share`: traces without a token."""
    distinct_2gram: Sign = field(default_factory=lambda: Sign(below=0.05))
    """`trace/distinct_2gram`: K equal traces have 1/K, loops far less."""
    degenerate_group_share: Sign = field(default_factory=lambda: Sign(above=0.9))
    """`reward/degenerate_group_share`: questions whose traces all have the same reward, which teach nothing."""
    group_std: Sign = field(default_factory=Sign)
    """`reward/group_std_mean`: spread of rewards within a group. No bound: its scale is the reward scheme's."""
    max_rollbacks: int = 3
    """So many rollbacks in the whole run; after them a sign with action `rollback` stops it."""
    straggler_ratio: float = 1.5
    """A rank is slow when a phase takes it this many times as long as its peers on average."""
    straggler_steps: int = 20
    """The same rank slow for so many steps in a row is said in one line."""
