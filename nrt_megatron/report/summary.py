"""The table at the end of a run, made from metrics.jsonl alone, so that a resumed run has the same one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from nrt_megatron.report.format import number, short, size, speeds
from nrt_megatron.report.metrics import METRICS_FILE

COMPARED = (
    ("accuracy, sampled trace", "eval/accuracy", ".3f"),
    ("accuracy, greedy trace", "eval/accuracy_greedy", ".3f"),
    ("accuracy, no trace", "eval/accuracy_direct", ".3f"),
    ("P(y*) per token, with trace", "eval/answer_prob", ".3f"),
    ("P(y*) per token, without trace", "eval/answer_prob_no_trace", ".3f"),
    ("trace length (tokens)", "eval/trace_length", ".1f"),
)
OF_STEPS = (
    ("trace reward", "reward/trace_mean", ".3f"),
    ("trace length (tokens)", "trace/length_mean", ".1f"),
    ("trace entropy (nats)", "trace/entropy", ".3f"),
)
PEAK_MEMORY = "memory/peak_bytes"
"""Largest of all ranks and since the start of the process."""


def summary(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What a run changed, by its first and last evaluation and its first and last step.

    rows: as `read_metrics` gives them. A quantity that was not measured has no line.
    """
    evaluations = [row for row in rows if any(key.startswith("eval/") for key in row)]
    steps = [row for row in rows if "loss" in row]
    table = Table("", Column("before", justify="right"), Column("after", justify="right"))
    for title, found, lines in (("held out", evaluations, COMPARED), ("training", steps, OF_STEPS)):
        if not found:
            continue
        table.add_section()
        table.add_row(title, f"step {found[0]['step']}", f"step {found[-1]['step']}" if found[1:] else "", style="bold")
        for name, key, spec in lines:
            if key in found[0] or key in found[-1]:
                first, last = (number(row.get(key), spec) for row in (found[0], found[-1]))
                table.add_row(f"  {name}", first, last if found[1:] else "")
    table.add_section()
    for phase, speed in speeds(steps).items():
        table.add_row(f"{phase} (tokens/s, mean)", "", short(speed))
    peaks = [row[PEAK_MEMORY] for row in rows if row.get(PEAK_MEMORY) is not None]
    if peaks:
        table.add_row("peak memory of a rank", "", size(max(peaks)))
    return table


def print_summary(
    rows: Sequence[Mapping[str, Any]],
    run_dir: Path,
    checkpoint: Path | None,
    console: Console | None = None,
) -> None:
    """The table, then where checkpoint and metrics lie, one path a line and never wrapped."""
    console = console or Console(highlight=False)
    console.print(summary(rows))
    console.print(f"checkpoint  {checkpoint if checkpoint is not None else 'none'}", soft_wrap=True)
    console.print(f"metrics     {run_dir / METRICS_FILE}", soft_wrap=True)
