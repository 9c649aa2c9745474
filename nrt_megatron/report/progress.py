"""Live progress of a run: a bar and the numbers of the last step on a terminal, one line a step elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from nrt_megatron.report.format import DASH, duration, number, short, speeds

SHOWN = (
    ("reward", "reward/trace_mean", ".3f"),
    ("trace length", "trace/length_mean", ".1f"),
    ("entropy", "trace/entropy", ".3f"),
    ("loss", "loss", ".4f"),
    ("grad norm", "grad_norm", ".3g"),
    ("lr", "lr", ".2e"),
)
EVALUATION = (
    ("accuracy", "eval/accuracy", ".3f"),
    ("greedy", "eval/accuracy_greedy", ".3f"),
    ("P(y*) with trace", "eval/answer_prob", ".3f"),
    ("without", "eval/answer_prob_no_trace", ".3f"),
)
_WINDOW = 20
"""Steps whose mean duration gives the time left."""


class Progress:
    """Shows rows of metrics as they are written; a context manager.

    total: steps of the whole run; done: those before this start. With `console=None` it writes to stdout, live
    when that is a terminal.
    """

    def __init__(self, total: int, done: int = 0, console: Console | None = None) -> None:
        self._total, self._done = total, done
        self._console = console or Console(highlight=False)
        self._last: Mapping[str, Any] = {}
        self._evaluated: Mapping[str, Any] = {}
        self._ends = deque([time.monotonic()], maxlen=_WINDOW + 1)
        self._live = Live(console=self._console, get_renderable=self._panel, refresh_per_second=2)

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live.is_started:
            self._live.stop()

    def show(self, row: Mapping[str, Any]) -> None:
        """Takes in one row of metrics: of a step, of an evaluation (only `eval/` keys), or of both."""
        if any(key.startswith("eval/") for key in row):
            self._evaluated = row
        if "loss" in row:
            self._last, self._done = row, row["step"]
            self._ends.append(time.monotonic())
        else:
            self._ends[-1] = time.monotonic()  # an evaluation between steps is not part of a step's duration
        if not self._live.is_started:
            self._console.print(self._line(row), soft_wrap=True)

    def say(self, text: str) -> None:
        """One line that stays, above the live part."""
        self._console.print(text, soft_wrap=True)

    @property
    def seconds_left(self) -> float | None:
        """By the mean of the last steps; None before the first."""
        if len(self._ends) < 2:
            return None
        return (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1) * (self._total - self._done)

    def _left(self) -> str:
        return DASH if self.seconds_left is None else duration(self.seconds_left)

    def _line(self, row: Mapping[str, Any]) -> str:
        parts = [f"step {row['step']}/{self._total}"]
        parts += [f"{name} {number(row[key], spec)}" for name, key, spec in (*SHOWN, *EVALUATION) if key in row]
        parts += [f"{phase} {short(speed)} tok/s" for phase, speed in speeds([row]).items()]
        return "  ".join([*parts, f"left {self._left()}"] if "loss" in row else parts)

    def _panel(self) -> Group:
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            f"step {self._done}/{self._total}",
            ProgressBar(total=self._total, completed=self._done, width=40),
            f"left {self._left()}",
        )
        numbers = Table.grid(padding=(0, 2))
        numbers.add_row(*(f"[dim]{n}[/] {number(self._last.get(key), spec)}" for n, key, spec in SHOWN))
        tokens = [f"[dim]{phase}[/] {short(speed)} tok/s" for phase, speed in speeds([self._last]).items()]
        held_out = [f"[dim]{n}[/] {number(self._evaluated.get(key), spec)}" for n, key, spec in EVALUATION]
        step = f"held out at step {self._evaluated['step']}:" if self._evaluated else "held out:"
        return Group(bar, numbers, "  ".join(tokens), "  ".join([step, *held_out]))
