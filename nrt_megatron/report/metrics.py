"""metrics.jsonl and TensorBoard, from the same dictionary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nrt_megatron.report.jsonl import StepLog, read_rows

METRICS_FILE = "metrics.jsonl"
NONFINITE = "nonfinite"
"""Number of values of a row that are null because they were NaN or infinite; absent when there are none."""


def clean_row(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Plain Python values, `step` first and the other keys in alphabetical order.

    Values are int, float, bool, str, None, or hold one number and have `.item()` (torch, numpy). NaN and
    infinities have no place in JSON: they become null and are counted under NONFINITE.
    """
    row = {"step": int(metrics["step"])}
    nonfinite = 0
    for key in sorted(metrics.keys() - {"step"}):
        value = metrics[key]
        value = value.item() if hasattr(value, "item") else value
        if isinstance(value, float) and not math.isfinite(value):
            value, nonfinite = None, nonfinite + 1
        row[key] = value
    return row | ({NONFINITE: nonfinite} if nonfinite else {})


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All complete rows of a run's metrics.jsonl. Raises ConfigError for a line that is none."""
    return [row for _, row in read_rows(run_dir / METRICS_FILE)]


class MetricsWriter:
    """Writes the metrics of a run; for the one rank that does.

    resume_step: the step whose checkpoint the run continues from, None for a new run. Rows of later steps are
    removed from the file and hidden in TensorBoard.
    """

    def __init__(self, run_dir: Path, resume_step: int | None = None, tensorboard: bool = True) -> None:
        self._log = StepLog(run_dir / METRICS_FILE, resume_step)
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            first = 0 if resume_step is None else resume_step + 1
            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first)

    def write(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Writes one row, which must have `step`, and returns it as it was written (see `clean_row`).

        Raises ConfigError when the disk refuses it.
        """
        row = clean_row(metrics)
        self._log.append(row)
        if self._board is not None:
            for key, value in row.items():
                if isinstance(value, (int, float)) and key != "step":
                    self._board.add_scalar(key, value, row["step"])
            self._board.flush()
        return row

    def close(self) -> None:
        """Closes file and TensorBoard."""
        self._log.close()
        if self._board is not None:
            self._board.close()
